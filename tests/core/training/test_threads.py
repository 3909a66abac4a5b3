"""How many threads compute: chosen by what was measured, and the same in a resumed run."""

import pytest
import torch

from core.formats.pickles import read_pickle
from core.training import threads
from core.training.loop import train
from core.training.threads import ASKED, ENOUGH_SECONDS, FEWEST, ROUNDS, candidates, fastest, measure, use_threads
from tests.core.training.test_loop import make_training


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """The numbers of threads that were set, none of them in earnest; OMP_NUM_THREADS is not set."""
    given = [1]
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: given[-1])
    monkeypatch.delenv(ASKED, raising=False)
    monkeypatch.setattr(threads, "_measured", {})
    return given


@pytest.mark.parametrize("cores, wanted", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_that_are_tried(cores, wanted):
    assert candidates(cores) == wanted


@pytest.mark.parametrize("seconds, wanted", [
    ({1: [0.030, 0.031, 0.030], 2: [0.016, 0.017, 0.016]}, 2),  # a free machine
    ({1: [0.017, 0.020, 0.017], 2: [0.527, 0.012, 0.610]}, 1),  # a busy one, with luck in one round
    ({1: [0.030] * 3, 2: [0.029] * 3}, 1),  # no gain
    ({1: [0.080] * 3, 2: [0.044] * 3, 4: [0.025] * 3, 8: [0.0245] * 3}, 4),
    ({1: [0.040, 0.040, 9.0], 2: [0.020, 9.0, 0.020]}, 2),  # the median, not the mean
    ({4: []}, 4)])
def test_the_fastest(seconds, wanted):
    assert fastest(seconds) == wanted


def clock(monkeypatch, numbers, seconds_of):
    """A clock that a probe moves by seconds_of(threads, round)."""
    now, calls = [0.0], {}

    def probe():
        count = numbers[-1]
        calls[count] = calls.get(count, -1) + 1
        now[0] += seconds_of(count, calls[count])

    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    return probe, calls


def test_measured_in_turn_without_the_first_round(monkeypatch, numbers):
    probe, _ = clock(monkeypatch, numbers, lambda count, turn: 5.0 if turn == 0 else 0.01 * count)
    seconds = measure([1, 2], probe)
    assert {count: [round(each, 6) for each in times] for count, times in seconds.items()} == {
        1: [0.01] * ROUNDS, 2: [0.02] * ROUNDS}
    assert numbers[1:5] == [1, 2, 1, 2]


def test_what_is_slow_is_not_tried_long(monkeypatch, numbers):
    probe, calls = clock(monkeypatch, numbers, lambda count, turn: ENOUGH_SECONDS if count == 2 else 0.01)
    seconds = measure([1, 2], probe)
    assert len(seconds[2]) == FEWEST == calls[2] and len(seconds[1]) == ROUNDS


def test_one_core_needs_no_measurement():
    assert measure([1], probe=None) == {1: []} and fastest({1: []}) == 1


def test_the_choice_is_said_and_kept(monkeypatch, numbers):
    monkeypatch.setattr(threads, "measure", lambda counts: {1: [0.017] * 3, 2: [0.5] * 3})
    assert use_threads() == "threads: 1; a probe took 17 ms with 1, 500 ms with 2" and numbers[-1] == 1
    monkeypatch.setattr(threads, "measure", None)
    assert use_threads() == "threads: 1, as measured before"
    later = threads.time.monotonic() + threads.VALID_SECONDS + 1
    monkeypatch.setattr(threads.time, "monotonic", lambda: later)
    monkeypatch.setattr(threads, "measure", lambda counts: {1: [0.03] * 3, 2: [0.016] * 3})
    assert use_threads() == "threads: 2; a probe took 30 ms with 1, 16 ms with 2" and numbers[-1] == 2


def test_who_asks_is_obeyed(monkeypatch, numbers):
    monkeypatch.setenv(ASKED, "1")
    monkeypatch.setattr(threads, "measure", None)
    assert use_threads() == use_threads(1) == "threads: 1, as OMP_NUM_THREADS says"
    assert "begun with 2, so its numbers may now differ" in use_threads(2)
    assert numbers == [1]  # nothing was set


def test_a_real_probe(monkeypatch):
    """Its outputs are those of a network: finite, of the input's size; how long it takes is not for a test."""
    seconds = measure([1, 2])
    assert all(0 < each < 60 for times in seconds.values() for each in times)


def test_a_resumed_run_takes_the_number_of_its_state(monkeypatch, numbers, tmp_path, capsys):
    monkeypatch.setattr(threads, "measure", lambda counts: {1: [0.5], 2: [0.1], 4: [0.01]})
    first = make_training(iterations=2)
    train(first, tmp_path, None, "again")
    assert read_pickle(tmp_path / "last.pt")["threads"] == 4
    numbers.append(1)  # another process
    monkeypatch.setattr(threads, "_measured", {})
    monkeypatch.setattr(threads, "measure", None)
    train(make_training(iterations=4), tmp_path, "last", "again")
    assert numbers[-1] == 4 and read_pickle(tmp_path / "last.pt")["threads"] == 4
    assert "threads: 4, as this run was begun with; OMP_NUM_THREADS sets another number" in capsys.readouterr().out
