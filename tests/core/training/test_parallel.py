"""Two processes (gloo) against one: the same weights, averages, optimiser states and files, replicated and sharded."""

import math
import os
import signal
import socket
import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.config.load import parse_config
from core.errors import Interrupted, UserError, run_command
from core.formats.pickles import read_pickle
from core.training.batches import BatchPlan
from core.training.distributed import ALONE, join
from core.training.loop import Training
from core.training.parallel import Replicated, Sharded, deal
from core.training.run_log import read_metrics
from ddpm_pretraining.train import Denoising, pretrain
from tests.conftest import error_of, merged
from tests.core.training.test_loop import INPUTS, TARGETS, Regression, make_training

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["core.training.parallel", "ddpm_pretraining.train", "torch.utils.tensorboard"])
# Two channels a norm group: with one, the bias before a norm has no gradient, and AdamW would step on rounding.
SMALL = {"dataset": {"image_size": [16, 16]}, "unet": {"base_channels": 8, "linear_attention": True},
         "ddpm": {"validate_every": 4, "sample_count": 1, "learning_rate": 3e-4}}
MEAN = {"batch_size": 3, "accumulation": 3, "clip": {"mode": "norm", "limit": 0.5}}
SUM = {"batch_size": 4, "accumulation": 3, "accumulation_reduction": "sum", "sampling": "epoch", "min_timestep": 1,
       "clip": {"mode": "value", "limit": 0.01}}
EVEN = {"batch_size": 2, "accumulation": 2, "clip": {"mode": "norm", "limit": 0.5}, "iterations": 2,
        "checkpoint_iterations": [1, 2], "validate_every": 1,
        "unet": {"channel_multipliers": [1], "blocks_per_level": 1}}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def member(function, rank, count, port, said, arguments):
    """One process of a job, as torchrun would start it, speaking into the file `said`."""
    sys.stderr = said.open("w")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def main():
        with join() as ranks:
            function(ranks, *arguments)

    run_command(main)


def together(function, *arguments, count=2):
    """Run function(ranks, *arguments) in `count` processes; returns their exit statuses and what they said."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        said = [Path(folder) / f"stderr{rank}" for rank in range(count)]
        members = [PROCESSES.Process(target=member, args=(function, rank, count, port, said[rank], arguments))
                   for rank in range(count)]
        for process in members:
            process.start()
        for process in members:
            process.join(300)
            process.kill()  # nothing where it has ended
        return [process.exitcode for process in members], "".join(path.read_text() for path in said)


def pretrain_all(ranks, studies):
    """Pre-train by every one of the plain configs."""
    for values in studies:
        pretrain(parse_config(values, "test"), ranks=ranks)


def succeeded(studies):
    """Whether two processes have pre-trained by all of `studies`."""
    statuses, said = together(pretrain_all, studies)
    assert statuses == [0, 0], said
    return True


@pytest.fixture(scope="module")
def study(make_values, tmp_path_factory):
    """study(name, section={...}) -> plain values of a small study; studies of the same name share their folder."""
    root = tmp_path_factory.mktemp("parallel")

    def make(name, sharding="none", unet=None, **ddpm):
        return make_values(root / name, experiment={"sharding": sharding}, **merged(SMALL, {"ddpm": ddpm,
                                                                                            "unet": unet or {}}))

    return make


def folder(values):
    return parse_config(values, "test").experiment_dir / "ddpm"


def assert_equal_runs(values, reference):
    """The states and weights of two runs differ by rounding, their files and logs in nothing else."""
    one, other = folder(values), folder(reference)
    state, wanted = read_pickle(one / "last.pt"), read_pickle(other / "last.pt")
    assert state.keys() == wanted.keys() and state["step"] == wanted["step"]
    torch.testing.assert_close(state["best"], wanted["best"], rtol=1e-5, atol=1e-5)
    for network in ("model", "ema"):
        assert list(state[network]) == list(wanted[network])
        torch.testing.assert_close(state[network], wanted[network], **TOLERANCE)
    assert state["optimizer"]["param_groups"] == wanted["optimizer"]["param_groups"]
    torch.testing.assert_close(state["optimizer"]["state"], wanted["optimizer"]["state"], **TOLERANCE)
    names = sorted(path.name for path in other.rglob("*") if path.suffix in (".safetensors", ".png"))
    assert names == sorted(path.name for path in one.rglob("*") if path.suffix in (".safetensors", ".png")) and names
    for name in (name for name in names if name.endswith(".safetensors")):
        torch.testing.assert_close(load_file(one / name), load_file(other / name), **TOLERANCE)
    lines, others = (read_metrics(path / "metrics.jsonl") for path in (one, other))
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, wanted in zip(lines, others, strict=True):
        assert all(line[key] == pytest.approx(wanted[key], rel=1e-5) for key in line
                   if key not in ("seconds", "images_per_second"))


def largest_difference(values, reference):
    states = (read_pickle(folder(v) / "last.pt") for v in (values, reference))
    one, other = ([*state["model"].values(), *state["ema"].values()] for state in states)
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def test_two_processes_equal_one(study):
    """Micro-batches cut in two, mean and sum, both clippings; then shares of the network."""
    pairs = [(study("mean2", **MEAN), study("mean1", **MEAN)), (study("sum2", **SUM), study("sum1", **SUM)),
             (study("full2", "full", **EVEN), study("full1", "full", **EVEN))]
    assert succeeded([split for split, _ in pairs])
    pretrain_all(ALONE, [alone for _, alone in pairs])
    start = study("start", **MEAN, iterations=1, checkpoint_iterations=[1], learning_rate=1e-12)
    pretrain_all(ALONE, [start])
    for split, alone in pairs:
        assert_equal_runs(split, alone)
        print(f"\n{folder(split).parts[-3]}: {largest_difference(split, alone):.2e}")
    assert all(largest_difference(split, start) > 5e-4 for split, _ in pairs[:2])  # they have moved


def test_resume_with_another_number_of_processes(study):
    """Replicated 2 -> 1 -> 2 processes and sharded 2 -> 1 -> 2 end as one process does."""
    def until(step, name, sharding="none"):
        recipe = {"accumulation_reduction": "sum", "clip": {"mode": "value", "limit": 0.01}, "iterations": step,
                  "checkpoint_iterations": [step]}
        return study(name, sharding, **{**EVEN, **recipe})

    assert succeeded([until(1, "changing"), until(1, "sharded", "full")])
    pretrain_all(ALONE, [until(2, "changing"), until(2, "sharded"), until(3, "straight")])
    assert succeeded([until(3, "changing"), until(3, "sharded", "full")])
    for name in ("changing", "sharded"):
        state, wanted = (read_pickle(folder(until(3, n)) / "last.pt") for n in (name, "straight"))
        assert state["step"] == wanted["step"] == 3
        for key in ("model", "ema"):
            torch.testing.assert_close(state[key], wanted[key], **TOLERANCE)
        torch.testing.assert_close(state["optimizer"]["state"], wanted["optimizer"]["state"], **TOLERANCE)


def stop_second(ranks, values):
    """Only rank 1 gets a signal, in its third step, and twice."""
    config = parse_config(values, "test")
    part_loss, calls = Denoising.part_loss, []

    def struck(self, *arguments):
        calls.append(None)
        if ranks.rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return part_loss(self, *arguments)

    Denoising.part_loss = struck
    try:
        pretrain(config, ranks=ranks)
    except Interrupted as stop:
        folder(values).joinpath(f"stopped{ranks.rank}").write_text(str(stop))
        raise


def test_all_stop_at_the_same_step(study):
    values = study("stopped", batch_size=4, save_every=100)
    statuses, error = together(stop_second, values)
    assert statuses == [130, 130] and error.count("interrupted: ") == 1, error
    said = [folder(values).joinpath(f"stopped{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and said[0].startswith("saved at step 3 of 6; continue with: "
                                                     "python -m core.training.distributed --nproc-per-node 2 "
                                                     "-m ddpm_pretraining.train --config ")
    assert read_pickle(folder(values) / "last.pt")["step"] == 3


def go_bad(ranks, values):
    """From the third step on the loss is NaN in the second process alone."""
    part_loss, calls = Denoising.part_loss, []

    def bad(self, *arguments):
        calls.append(None)
        return part_loss(self, *arguments) * (math.nan if ranks.rank == 1 and len(calls) == 3 else 1)

    Denoising.part_loss = bad
    pretrain(parse_config(values, "test"), ranks=ranks)


def test_non_finite_loss_of_one_process_ends_all(study):
    values = study("nan", batch_size=4)
    statuses, said = together(go_bad, values)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert statuses == [2, 2] and len(errors) == 1, said
    assert errors[0].startswith("error: loss is nan at step 3, batch of ")
    assert read_pickle(folder(values) / "last.pt")["step"] == 2


# --- who gets which images ---


@pytest.mark.parametrize(("sizes", "count", "wanted"), [
    ([8], 2, [[(0, 0, 4)], [(0, 4, 8)]]),
    ([3, 3], 2, [[(0, 0, 3)], [(1, 0, 3)]]),
    ([3], 2, [[(0, 0, 1)], [(0, 1, 3)]]),
    ([4, 4, 4], 2, [[(0, 0, 4), (1, 0, 2)], [(1, 2, 4), (2, 0, 4)]]),
    ([2, 1], 3, [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)]]),
])
def test_deal(sizes, count, wanted):
    groups = [np.arange(size) for size in sizes]
    dealt = [[(micro, part.start, part.stop) for micro, part in deal(groups, rank, count)] for rank in range(count)]
    assert dealt == wanted


@dataclass
class DealtRegression(Regression):
    """A task on numbers that draws one more number for each image of a micro-batch."""

    def part_loss(self, model, indices, generator, part=slice(None)):
        """Mean squared error of a part of a micro-batch."""
        drawn = torch.randn(len(indices), 1, generator=generator)
        return (model(INPUTS[indices]) - TARGETS[indices] - drawn)[part].square().mean()

    loss = part_loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("plan", "count"), [((12, 3, 2, "stream"), 2), ((12, 3, 2, "stream"), 4),
                                             ((12, 5, 1, "epoch"), 2), ((12, 5, 2, "epoch"), 2)])
def test_shares_add_up(monkeypatch, reduction, plan, count):
    """What DDP averages, without the processes: gradients and losses of every share, against all in one."""
    def accumulated(training):
        total = training.accumulate(training.plan.groups(1))
        return [parameter.grad for parameter in training.parameters], total

    def make():
        return make_training(DealtRegression(), BatchPlan(*plan, False, 0), accumulation_reduction=reduction)

    for name in ("prepare", "exchanging"):
        monkeypatch.setattr(Replicated, name, getattr(Training, name, lambda self, last: nullcontext()))
    shares = []
    for rank in range(count):
        alone = make()
        ranks = SimpleNamespace(rank=rank, count=count, check_device=lambda device: None)
        shares.append(accumulated(Replicated(alone.model, alone.task, alone.plan, alone.settings, ranks)))
    wanted, loss = accumulated(make())
    gradients = [torch.stack(parts).mean(0) for parts in zip(*(share for share, _ in shares), strict=True)]
    torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sum(total for _, total in shares), loss)


@pytest.mark.parametrize(("training", "plan", "count", "message"), [
    (Replicated, (40, 4, 1, "stream"), 5, "a step of 4 images .* leaves nothing to some of 5 processes; start at most"),
    (Replicated, (9, 4, 2, "epoch"), 5, None),
    (Sharded, (40, 4, 3, "stream"), 2, None),
    (Sharded, (40, 4, 3, "stream"), 4, r"4 processes cannot share micro-batches of \[4, 4, 4\] images evenly"),
])
def test_steps_that_cannot_be_shared(training, plan, count, message):
    groups = BatchPlan(*plan, True, 0).groups(0)
    check = training.check_shares
    unbound = object.__new__(training)
    if message is None:
        check(unbound, groups, count)
        return
    with pytest.raises(UserError, match=message):
        check(unbound, groups, count)


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as ranks:
        assert ranks is ALONE and ranks.leads and ranks.told(3) == 3 and ranks.any(True) and not ranks.any(False)
        assert not torch.distributed.is_initialized() and ranks.command("a.b") == "python -m a.b"


def test_processes_that_cannot_meet(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start them with torchrun" in error_of(join().__enter__)
