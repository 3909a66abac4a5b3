"""The training loop against hand-written lists, closed forms and torch: no images, a linear model on numbers."""

import copy
import json
import math
import os
import signal
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from core.config.section import Clip
from core.errors import Interrupted, UserError
from core.formats.pickles import read_pickle
from core.training.batches import BatchPlan
from core.training.loop import LoopSettings, Training, train
from core.training.run_log import read_metrics

CPU = torch.device("cpu")
INPUTS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(12, 1, generator=torch.Generator().manual_seed(1)) * 3


def fixed_plan(monkeypatch, **settings):
    """A plan whose permutation of epoch e is 0..count-1 turned by e."""
    monkeypatch.setattr(BatchPlan, "_permutation", lambda self, epoch: np.roll(np.arange(self.count), -epoch))
    return BatchPlan(**{"seed": 0, "drop_last": True} | settings)


def lists(plan, step):
    return [indices.tolist() for indices in plan.groups(step)]


@dataclass
class Regression:
    """A task on the numbers above. `scripted` are validation losses; `at` calls a function after the step's loss."""

    scripted: list = field(default_factory=list)
    at: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    steps: int = 0

    def loss(self, model, indices, generator):
        """Mean squared error of one micro-batch."""
        self.steps += 1
        loss = (model(INPUTS[indices]) - TARGETS[indices]).square().mean()
        return self.at.get(self.steps, lambda value: value)(loss)

    def names(self, indices):
        """image00.png and so on."""
        return [f"image{index:02d}.png" for index in indices]

    def validate(self, model, step):
        """The next scripted loss, if there is one."""
        self.calls.append(("validate", step))
        return {"validation_loss": self.scripted.pop(0)} if self.scripted else {}

    def milestone(self, model, step):
        """Noted."""
        self.calls.append(("milestone", step))

    def improved(self, model, step):
        """Noted."""
        self.calls.append(("improved", step))


def make_training(task=None, plan=None, weight=None, **changes):
    """A linear model (3 -> 1) with known weights under the loop's care."""
    plan = plan or BatchPlan(12, 3, 1, "stream", False, 0)
    settings = {"title": "test", "identity": "test", "iterations": 6, "seed": 0, "device": CPU, "precision": "float32",
                "learning_rate": 0.1, "weight_decay": 0.0, "clip": Clip(), "accumulation_reduction": "mean",
                "ema_decay": None, "log_every": 2, "save_every": 2, "validate_every": 100} | changes
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.2, 0.3]]) if weight is None else weight)
        model.bias.zero_()
    return Training(model, task or Regression(), plan, LoopSettings(**settings))


def weights(training):
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def reference_step(indices, scale=1.0, clip=None, **options):
    """The weights after torch's own AdamW has made one step on `indices` as one batch."""
    model = make_training().model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **{"weight_decay": 0.0} | options)
    ((model(INPUTS[indices]) - TARGETS[indices]).square().mean() * scale).backward()
    if clip:
        clip(list(model.parameters()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], gradients


def kept_gradients(training, monkeypatch):
    """The gradients at the moment of the optimiser's step."""
    kept, step = [], training.optimizer.step

    def noted():
        kept.extend(parameter.grad.clone() for parameter in training.parameters)
        step()

    monkeypatch.setattr(training.optimizer, "step", noted)
    return kept


# --- one step ---


def test_mean_of_micro_batches_is_one_big_batch(monkeypatch):
    plan = fixed_plan(monkeypatch, count=12, batch_size=3, accumulation=4, sampling="stream")
    training = make_training(plan=plan)
    kept = kept_gradients(training, monkeypatch)
    assert training.optimiser_step() == 12
    after, gradients = reference_step(range(12))
    torch.testing.assert_close(kept, gradients)
    torch.testing.assert_close(weights(training), after)
    everything = (INPUTS @ torch.tensor([[0.1], [-0.2], [0.3]]) - TARGETS).square().mean().item()
    assert training.check_losses() == pytest.approx(everything, rel=1e-6)


def test_sum_of_micro_batches_clipped_by_value(monkeypatch):
    plan = fixed_plan(monkeypatch, count=12, batch_size=3, accumulation=4, sampling="stream")
    training = make_training(plan=plan, accumulation_reduction="sum", clip=Clip(mode="value", limit=1.0))
    kept = kept_gradients(training, monkeypatch)
    training.optimiser_step()
    _, unclipped = reference_step(range(12), scale=4)
    assert any((gradient.abs() > 1).any() for gradient in unclipped)
    torch.testing.assert_close(kept, [gradient.clamp(-1, 1) for gradient in unclipped])


def test_clip_by_norm(monkeypatch):
    training = make_training(plan=BatchPlan(12, 12, 1, "stream", False, 0), clip=Clip(mode="norm", limit=0.5))
    kept = kept_gradients(training, monkeypatch)
    training.optimiser_step()
    _, unclipped = reference_step(range(12))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in unclipped))
    assert norm > 0.5
    torch.testing.assert_close(kept, [gradient * 0.5 / norm for gradient in unclipped], rtol=1e-4, atol=1e-6)


def test_weight_decay():
    training = make_training(plan=BatchPlan(12, 12, 1, "stream", False, 0), weight_decay=0.3)
    training.optimiser_step()
    torch.testing.assert_close(weights(training), reference_step(range(12), weight_decay=0.3)[0])


def test_moving_average_closed_form():
    """EMA_n = d^n w_0 + (1 - d) sum_k d^(n - k) w_k, from the first step on."""
    training, decay = make_training(ema_decay=0.9), 0.9
    trail = [weights(training)[0]]
    for _ in range(5):
        training.optimiser_step()
        trail.append(weights(training)[0])
    wanted = decay**5 * trail[0] + (1 - decay) * sum(decay ** (5 - k) * trail[k] for k in range(1, 6))
    torch.testing.assert_close(training.ema.weight, wanted)
    assert not torch.allclose(wanted, trail[-1], atol=1e-2) and training.ema.weight.requires_grad is False


def learning_rates(steps, **settings):
    training, rates = make_training(**settings), []
    for _ in range(steps):
        training.optimiser_step()
        rates.append(training.optimizer.param_groups[0]["lr"])
    return rates


def test_learning_rates():
    assert learning_rates(3, scheduler="constant") == pytest.approx([0.1] * 3)
    assert learning_rates(4, scheduler="constant", warmup_iterations=3) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    cosine = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert learning_rates(6, scheduler="cosine", iterations=6) == pytest.approx(cosine)
    warm = [0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    assert learning_rates(6, scheduler="cosine", iterations=6, warmup_iterations=2) == pytest.approx(warm)


# --- a whole run ---


def run(training, folder, resume=None):
    train(training, folder, resume, "python -m this")


def test_plateau_and_early_stop(tmp_path):
    """Best at step 2; patience 1 halves the rate at the second bad validation; the fourth bad one stops the run."""
    task = Regression(scripted=[3.0, 2.0, 2.0, 2.5, 2.5, 2.5, 0.0])
    training = make_training(task, scheduler="plateau", plateau_factor=0.5, plateau_patience=1, early_stop_patience=4,
                             validate_every=1, iterations=100, log_every=1)
    run(training, tmp_path)
    assert training.step == 6
    assert [step for what, step in task.calls if what == "improved"] == [1, 2]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert [line["validation_loss"] for line in lines if "validation_loss" in line] == [3.0, 2.0, 2.0, 2.5, 2.5, 2.5]
    state = read_pickle(tmp_path / "last.pt")
    assert (state["step"], state["best"], state["since_best"]) == (6, 2.0, 4)


def test_a_plateau_schedule_warms_up(tmp_path):
    """By hand: thirds of the rate; the loss at its end is the first that counts, two no better ones halve it."""
    task = Regression(scripted=[2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    training = make_training(task, scheduler="plateau", plateau_factor=0.5, plateau_patience=1, warmup_iterations=3,
                             validate_every=1, iterations=7, log_every=1)
    run(training, tmp_path)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in line]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1, 0.05, 0.05])


def test_early_stop_count_and_plateau_survive_a_resume(tmp_path):
    script = [3.0, 2.0, 2.0, 2.5, 2.5, 2.5, 0.0]
    options = {"scheduler": "plateau", "plateau_patience": 1, "early_stop_patience": 4, "validate_every": 1,
               "save_every": 1}
    interrupted = make_training(Regression(scripted=script[:4]), iterations=4, **options)
    run(interrupted, tmp_path)
    resumed = make_training(Regression(scripted=script[4:]), iterations=100, **options)
    run(resumed, tmp_path, "last")
    assert resumed.step == 6 and resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_last_step_is_validated_saved_and_a_milestone(tmp_path):
    task = Regression(scripted=[1.0] * 9)
    run(make_training(task, iterations=5, validate_every=2, milestones=frozenset({3, 5})), tmp_path)
    assert task.calls == [("validate", 2), ("improved", 2), ("milestone", 3), ("validate", 4), ("validate", 5),
                          ("milestone", 5)]
    assert read_pickle(tmp_path / "last.pt")["step"] == 5 and read_pickle(tmp_path / "previous.pt")["step"] == 4
    assert [p.name for p in sorted(tmp_path.iterdir()) if p.is_file()] == ["last.pt", "metrics.jsonl", "previous.pt"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_loss(tmp_path, monkeypatch, bad):
    """Step 4 goes wrong and is looked at only after step 6: step, files and the last good state are still right."""
    plan = fixed_plan(monkeypatch, count=12, batch_size=3, accumulation=1, sampling="stream")
    training = make_training(Regression(at={4: lambda loss: loss * bad}), plan, save_every=3, log_every=3)
    with pytest.raises(UserError) as caught:
        run(training, tmp_path)
    message = str(caught.value)
    assert training.step == 6 and f"loss is {bad} at step 4," in message and "\n" not in message
    assert "batch of image09.png, image10.png, image11.png;" in message and "before that step is kept" in message
    state = read_pickle(tmp_path / "last.pt")
    assert state["step"] == 3 and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_stops(tmp_path, number):
    def kill(loss):
        os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        run(make_training(Regression(at={3: kill}), iterations=9, save_every=100), tmp_path)
    assert str(caught.value) == "saved at step 3 of 9; continue with: python -m this --resume"
    assert read_pickle(tmp_path / "last.pt")["step"] == 3 and signal.getsignal(number) is before
    resumed, straight = make_training(iterations=9), make_training(iterations=9)
    run(resumed, tmp_path, "last")
    run(straight, tmp_path / "straight")
    assert all(map(torch.equal, weights(resumed), weights(straight)))


def test_signal_during_validation_is_not_taken_for_saved(tmp_path):
    """A signal that comes after the step's save was decided on stops the run one step later, with that step saved."""
    task = Regression()
    validate = task.validate

    def interrupted(model, step):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(model, step)

    task.validate = interrupted
    with pytest.raises(Interrupted, match="saved at step 4 of 9"):
        run(make_training(task, iterations=9, save_every=100, validate_every=3), tmp_path)
    assert read_pickle(tmp_path / "last.pt")["step"] == 4


def test_second_signal_stops_at_once(tmp_path):
    def kill_twice(loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        run(make_training(Regression(at={3: kill_twice})), tmp_path)
    assert read_pickle(tmp_path / "last.pt")["step"] == 2


def test_signal_in_the_last_step_ends_well(tmp_path):
    def kill(loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    run(make_training(Regression(at={6: kill})), tmp_path)
    assert read_pickle(tmp_path / "last.pt")["step"] == 6


def test_lines_after_a_resume_are_not_doubled(tmp_path):
    """Killed after step 5 was logged, saved at 4, the last line torn: each step stands once, in order."""
    run(make_training(iterations=4), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 7.0}) + '\n{"step": 6, "lo')
    run(make_training(iterations=8), tmp_path, "last")
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in text] == [2, 4, 6, 8]
    run(make_training(iterations=8), tmp_path, "previous")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8]


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    run(make_training(learning_rate=1e-9, plan=BatchPlan(12, 3, 1, "epoch", False, 0), iterations=4, log_every=4,
                      save_every=4), tmp_path)
    everything = (INPUTS @ torch.tensor([[0.1], [-0.2], [0.3]]) - TARGETS).square().mean().item()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4] and lines[0]["loss"] == pytest.approx(everything, rel=1e-5)


def test_state_of_another_network_is_refused(tmp_path):
    run(make_training(), tmp_path)
    training = make_training()
    other = Training(nn.Linear(4, 1), training.task, training.plan, training.settings)
    with pytest.raises(UserError, match="last.pt: the saved state is of another network") as caught:
        run(other, tmp_path, "last")
    assert "\n" not in str(caught.value)


def other_moments(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)


def no_moments(state):
    del state["optimizer"]["param_groups"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.update(identity="ddpm of experiment.seed 1"), "is the state of ddpm of experiment.seed 1, "),
    (lambda state: state.update(made_with={"a.b": 3, "new": 1}), r"is the state of a run with a\.b = 3, not \[1, 2\]"),
    (other_moments, r"exp_avg of a parameter of shape \[1, 3\] has the shape \[2, 2\]"),
    (no_moments, "does not hold what this training's state holds"),
    (lambda state: state.pop("plateau"), "does not hold what this training's state holds"),
    (lambda state: state.pop("step"), "holds no training state"),
], ids=["identity", "settings", "moments", "groups", "plateau", "step"])
def test_the_state_of_another_run_is_refused(tmp_path, change, message):
    run(make_training(made_with={"a.b": (1, 2), "c": None}), tmp_path)
    path = tmp_path / "last.pt"
    state = torch.load(path, weights_only=True)
    assert state["made_with"] == {"a.b": (1, 2), "c": None}
    del state["checksum"]  # as of older ones
    change(state)
    torch.save(state, path)
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(UserError, match=message) as caught:
        run(make_training(made_with={"a.b": (1, 2), "c": None}), tmp_path, "last")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_state_in_another_memory_layout(tmp_path):
    """Weights lie channels last here and contiguous in a sharded run or on another device: the moments follow them."""
    images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def make():
        torch.manual_seed(0)
        task = Regression()
        task.loss = lambda model, indices, generator: (model(images[indices]) - 1).square().mean()
        like = make_training()
        return Training(nn.Conv2d(3, 5, 3), task, like.plan, like.settings)

    straight, resumed = make(), make()
    straight.optimiser_step()
    state = copy.deepcopy(straight.state())
    moments = {index: {name: value.contiguous() for name, value in entry.items()}
               for index, entry in state["optimizer"]["state"].items()}
    resumed.restore({**state, "optimizer": {**state["optimizer"], "state": moments}}, tmp_path)
    for training in (straight, resumed):
        training.optimiser_step()
    assert all(map(torch.equal, weights(resumed), weights(straight)))


def test_resume_without_a_state(tmp_path):
    for which in ("last", "previous"):
        with pytest.raises(UserError, match=f"{which}.pt does not exist"):
            run(make_training(), tmp_path / "empty", which)
    assert not (tmp_path / "empty").exists()


def test_bf16_autocasts_the_loss_only(tmp_path):
    seen = []
    task = Regression(at={1: lambda loss: seen.append(loss) or loss})
    loss = task.loss

    def noted(model, indices, generator):
        seen.append(model(INPUTS[indices]).dtype)
        return loss(model, indices, generator)

    task.loss = noted
    training = make_training(task, precision="bf16", iterations=1)
    run(training, tmp_path)
    assert seen[0] == torch.bfloat16 and training.model.weight.dtype == torch.float32
