"""Files written in the background: in order, all there at the end, and errors never lost."""

import threading

import pytest
import torch

from core.background import MOST_WAITING, finish_writing, snapshot, writing_in_background, written


def test_without_a_background_a_write_is_done_at_once():
    done = []
    written(done.append, 1)
    finish_writing()
    with writing_in_background(False):
        written(done.append, 2)
        assert done == [1, 2]


def test_writes_keep_their_order_and_are_done_at_the_end():
    done, gate = [], threading.Event()
    with writing_in_background(True):
        written(gate.wait)
        written(done.append, 1)
        assert done == []  # training goes on
        gate.set()
        for number in range(2, 3 + MOST_WAITING):
            written(done.append, number)
        finish_writing()
        assert done == list(range(1, 3 + MOST_WAITING))
        written(done.append, "last")
    assert done[-1] == "last"


def test_an_error_is_raised_by_a_later_write_or_at_the_end():
    def fail():
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"), writing_in_background(True):
        written(fail)
    with pytest.raises(OSError, match="no space"), writing_in_background(True):
        written(fail)
        finish_writing()
    done = []
    written(done.append, "at once")  # no thread is left behind
    assert done == ["at once"]


def test_what_was_given_is_written_when_training_fails():
    done = []
    with pytest.raises(KeyError), writing_in_background(True):
        written(done.append, 1)
        raise KeyError("loss")
    assert done == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies are made of a GPU's tensors")
def test_snapshot_is_not_changed_by_training():
    weight = torch.ones(5, device="cuda")
    taken = snapshot({"a": [weight], "step": 3})
    weight.zero_()
    assert taken["a"][0].tolist() == [1] * 5 and taken["step"] == 3 and not taken["a"][0].is_cuda


def test_snapshot_keeps_values_of_a_cpu():
    weight, pair = torch.ones(2), (1, "x")
    taken = snapshot({"a": {"b": weight}, "pair": pair, "none": None})
    assert taken["a"]["b"] is weight and taken["pair"] == pair and taken["none"] is None
