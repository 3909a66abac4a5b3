"""Runs that are killed, cut off or interrupted end, once continued, like an uninterrupted run: bit for bit."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config.load import load_config
from core.formats.pickles import read_pickle
from core.runs.places import Cell
from core.training.loop import Training
from core.training.run_log import read_metrics
from ddpm_pretraining.train import pretrain
from landmarks_finetuning.train import finetune_cell
from tests.conftest import PROJECT

PRETRAINING, FINETUNING = "ddpm_pretraining.train", "landmarks_finetuning.train"
CELL = ("--backbone", "scratch", "--shots", "3")
RECIPE = {"finetune": {"iterations": 6, "backbones": ["scratch"], "shots": [3], "save_every": 2, "validate_every": 1,
                       "log_every": 2, "scheduler": "plateau", "plateau_patience": 0, "early_stop_patience": 100}}
# Runs a command that sends itself a signal at its n-th optimiser step, or in the middle of its n-th write of last.pt.
SABOTAGE = """
import os, runpy, sys
import core.training.loop as loop
where, count, number, module, *arguments = sys.argv[1:]
calls = []
def strike():
    calls.append(None)
    if len(calls) == int(count):
        os.kill(os.getpid(), int(number))
if where == "step":
    step = loop.Training.optimiser_step
    def broken(self):
        strike()
        return step(self)
    loop.Training.optimiser_step = broken
else:
    import torch
    save = torch.save
    def broken(state, file):
        file.write(b"half a state")
        file.flush()
        strike()
        file.seek(0)
        save(state, file)
    torch.save = broken
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__")
"""


# A launcher with two Ctrl-C in the middle of the second last.pt that it writes; as a file, which workers run as well.
TWO_CTRL_C = """
import multiprocessing, os, runpy, signal, sys, time
import torch
save, saves = torch.save, []
class Struck:
    def __init__(self, file):
        self.file, self.writes = file, 0
    def write(self, data):
        self.writes += 1
        if (len(saves), self.writes) == (2, 4):  # where torch makes a RuntimeError of whatever is raised
            worker = multiprocessing.parent_process() is not None
            for _ in range(2):
                os.kill(os.getppid() if worker else os.getpid(), signal.SIGINT)
                time.sleep(1)
        return self.file.write(data)
    def flush(self):
        self.file.flush()
def broken(state, file):
    saves.append(None)
    save(state, Struck(file))
torch.save = broken
if __name__ == "__main__":
    runpy.run_module("study.launch", run_name="__main__")
"""


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run([str(argument) for argument in arguments], cwd=PROJECT, env=environment, text=True,
                          capture_output=True, timeout=120, check=False, **options)


def sabotaged(where, count, number, module, *arguments):
    """The finished process of `module`, struck by signal `number` at the count-th step or save."""
    return command(sys.executable, "-c", SABOTAGE, where, count, int(number), module, *arguments)


def only(folder, pattern):
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def same(one, other):
    """Whether two weights files hold the same tensors, bit for bit."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys() and len(first) > 10
    return all(torch.equal(first[name], second[name]) for name in first)


def final_files(folder):
    """What a run is for: its weights, by name."""
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    assert files
    return files


def assert_same_run(run_dir, reference):
    """Weights and metrics.jsonl (but for times) of two finished runs are the same."""
    files, wanted = final_files(run_dir), final_files(reference)
    assert files.keys() == wanted.keys() and all(same(files[name], wanted[name]) for name in files)
    state, last = read_pickle(run_dir / "last.pt"), read_pickle(reference / "last.pt")
    assert state["step"] == last["step"] and state["best"] == last["best"]
    assert all(torch.equal(state["model"][name], last["model"][name]) for name in last["model"])
    timed = {"seconds", "images_per_second"}
    lines, others = ([{k: v for k, v in line.items() if k not in timed} for line in read_metrics(d / "metrics.jsonl")]
                     for d in (run_dir, reference))
    assert lines == others


@pytest.fixture(scope="module")
def pretrained(make_config, tmp_path_factory):
    """An uninterrupted pre-training."""
    return pretrain(make_config(tmp_path_factory.mktemp("straight")))


@pytest.fixture(scope="module")
def finetuned(make_config, tmp_path_factory):
    """An uninterrupted fine-tuning from scratch: 6 steps, plateau schedule, moving average."""
    return finetune_cell(make_config(tmp_path_factory.mktemp("straight"), **RECIPE), Cell("scratch", 3, 0, 0))


def test_killed_pretraining(config_file, pretrained, tmp_path, run_main):
    """kill -9 at the fifth step, then in the middle of writing last.pt, then the same command to the end."""
    path, run_dir = config_file(), tmp_path / "runs/tiny/ddpm"
    done = sabotaged("step", 5, signal.SIGKILL, PRETRAINING, "--config", path)
    assert done.returncode == -signal.SIGKILL and read_pickle(run_dir / "last.pt")["step"] == 4
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 9}\n{"st')  # what a later kill would have left
    status, out, _ = run_main(PRETRAINING, "--config", path)
    assert status == 0 and str(run_dir) in out
    assert_same_run(run_dir, pretrained)
    assert sorted(final_files(run_dir)) == ["ema_iter000003.safetensors", "ema_iter000006.safetensors"]
    assert not same(*final_files(run_dir).values())


def test_killed_finetuning(config_file, finetuned, tmp_path, run_main):
    """kill -9 while the second last.pt is half written: the first one is whole, and continues to the same end."""
    path = config_file(**RECIPE)
    done = sabotaged("save", 2, signal.SIGKILL, FINETUNING, "--config", path, *CELL)
    run_dir = only(tmp_path, "runs/tiny/landmarks/scratch/*/shots003_draw0_seed0")
    assert done.returncode == -signal.SIGKILL and read_pickle(run_dir / "last.pt")["step"] == 2
    status, out, _ = run_main(FINETUNING, "--config", path, *CELL, "--resume")
    assert status == 0 and f"landmarks_finetuning.evaluate {run_dir}" in out
    assert_same_run(run_dir, finetuned)


def test_killed_in_every_stage(config_file, make_config, tmp_path, tmp_path_factory, run_main):
    """kill -9 in the second stage, in the next round's first stage and in its second one."""
    staged = {**RECIPE, "finetune": {**RECIPE["finetune"], "refine": {"zoom": 2, "crop": 16, "iterations": 4},
                                     "self_training": {"rounds": 1, "images": 4}}}  # fmt: skip
    straight = finetune_cell(make_config(tmp_path_factory.mktemp("straight"), **staged), Cell("scratch", 3, 0, 0))
    path = config_file(**staged)
    for steps, at in ((9, "fine"), (5, "round1"), (7, "round1/fine")):  # 6 + 3; 2 + 3; 4 + 3
        assert sabotaged("step", steps, signal.SIGKILL, FINETUNING, "--config", path, *CELL).returncode == -9
        run_dir = only(tmp_path, "runs/tiny/landmarks/scratch/*/shots003_draw0_seed0")
        assert read_pickle(run_dir / at / "last.pt")["step"] == 2
    assert run_main(FINETUNING, "--config", path, *CELL)[0] == 0
    for stage in ("", "fine", "round1", "round1/fine"):
        assert_same_run(run_dir / stage, straight / stage)
    assert (run_dir / "pseudo_labels.npz").read_bytes() == (straight / "pseudo_labels.npz").read_bytes()


def test_truncated_state(config_file, pretrained, tmp_path, run_main):
    """Exit 2 and one line that offers --resume previous; that command, as printed, comes to the same end."""
    path, run_dir = config_file(), tmp_path / "runs/tiny/ddpm"
    config = load_config(path, ["ddpm.iterations=5", "ddpm.checkpoint_iterations=[3]"])  # extended by the runs below
    pretrain(config)
    state = (run_dir / "last.pt").read_bytes()
    for remains in (state[: len(state) // 2], b""):
        (run_dir / "last.pt").write_bytes(remains)
        weights = (run_dir / "ema_iter000003.safetensors").stat().st_mtime_ns
        for arguments in ((), ("--resume",)):
            status, _, error = run_main(PRETRAINING, "--config", path, *arguments)
            line = error.strip().splitlines()
            assert status == 2 and len(line) == 1, error
            assert line[0].startswith(f"error: {run_dir / 'last.pt'} is truncated or not a checkpoint")
            assert "previous.pt (step 4) is whole" in line[0] and line[0].endswith("--resume previous")
        assert (run_dir / "last.pt").read_bytes() == remains
        assert (run_dir / "ema_iter000003.safetensors").stat().st_mtime_ns == weights
    offered = shlex.split(line[0].partition("continue from it with ")[2])
    assert offered[:3] == ["python", "-m", PRETRAINING]
    assert run_main(PRETRAINING, *offered[3:])[0] == 0
    assert_same_run(run_dir, pretrained)


def test_truncated_states_both(config_file, tmp_path, run_main):
    """Without a whole state nothing starts afresh."""
    path, run_dir = config_file(), tmp_path / "runs/tiny/ddpm"
    run_dir.mkdir(parents=True)
    for name in ("last.pt", "previous.pt"):
        (run_dir / name).write_bytes(b"PK cut off")
    for arguments in ((), ("--resume",), ("--resume", "previous")):
        status, _, error = run_main(PRETRAINING, "--config", path, *arguments)
        assert status == 2 and re.search(r".pt is (truncated|damaged)", error) and len(error.splitlines()) == 1
    (run_dir / "previous.pt").unlink()
    status, _, error = run_main(PRETRAINING, "--config", path)
    assert status == 2 and error.endswith(f"delete {run_dir / 'last.pt'} to start this run over\n")
    assert (run_dir / "last.pt").read_bytes() == b"PK cut off" and not list(run_dir.glob("*.safetensors"))


def test_ctrl_c(config_file, pretrained, tmp_path):
    """SIGINT exits 130 and prints a command that, run as it is, comes to the same end; the path has a space in it."""
    path = config_file(experiment={"output_dir": str(tmp_path / "my runs")})
    done = sabotaged("step", 3, signal.SIGINT, PRETRAINING, "--config", path)
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert last_line.startswith("interrupted: saved at step 3 of 6; continue with: ")
    printed = last_line.partition("continue with: ")[2]
    again = command("bash", "-c", printed)
    assert again.returncode == 0, again.stderr
    run_dir = tmp_path / "my runs/tiny/ddpm"
    files, wanted = final_files(run_dir), final_files(pretrained)
    assert files.keys() == wanted.keys() and all(same(files[name], wanted[name]) for name in files)


def test_ctrl_c_in_finetuning(config_file, finetuned, tmp_path, run_main, monkeypatch):
    """SIGTERM does the same; the printed command names the cell."""
    path, step = config_file(**RECIPE), Training.optimiser_step

    def struck(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "optimiser_step", struck)
        status, _, error = run_main(FINETUNING, "--config", path, *CELL)
    last_line = error.strip().splitlines()[-1]
    assert status == 130 and "interrupted: saved at step 3 of 6" in last_line
    printed = shlex.split(last_line.partition("continue with: ")[2])
    assert printed[:3] == ["python", "-m", FINETUNING]
    assert run_main(FINETUNING, *printed[3:])[0] == 0
    run_dir = only(tmp_path, "runs/tiny/landmarks/scratch/*/shots003_draw0_seed0")
    assert same(run_dir / "best.safetensors", finetuned / "best.safetensors")


@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["alone", "worker"])
def test_second_ctrl_c_while_a_state_is_saved(config_file, finetuned, tmp_path, run_main, workers):
    """It ends the whole study, of which no run fails, and the state before is whole: the study ends as usual later."""
    path, script = config_file(**RECIPE, experiment={"device": "cpu"}), tmp_path / "launcher.py"
    script.write_text(TWO_CTRL_C)
    study = ("--config", path, "--stages", "finetune", "--seeds", "0", "1", "--set", "finetune.draws=[0]")
    done = command(sys.executable, script, *study, *workers)
    assert done.returncode == 130 and "interrupted: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("failed.json"))
    run_dir = only(tmp_path, "runs/tiny/landmarks/scratch/*/shots003_draw0_seed*")  # the second one was not begun
    assert read_pickle(run_dir / "last.pt")["step"] == 2 and not list(run_dir.glob(".*"))
    assert run_main("study.launch", *study)[0] == 0
    assert same(run_dir / "best.safetensors", finetuned / "best.safetensors")


def test_finished_run_is_left_alone(pretrained, make_config):
    """Running the same command again reads the state and writes no weights."""
    before = {path.name: path.stat().st_mtime_ns for path in pretrained.iterdir() if path.suffix in (".pt",
                                                                                                    ".safetensors")}
    pretrain(make_config(pretrained.parents[1]))
    assert before == {name: (pretrained / name).stat().st_mtime_ns for name in before} and len(before) == 4


def test_resume_with_other_settings_is_refused(make_values, pretrained, run_main, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(make_values(pretrained.parents[1])))
    for key, old, new in (("ddpm.batch_size", 2, 4), ("experiment.seed", 0, 7), ("unet.base_channels", 8, 16)):
        status, _, error = run_main(PRETRAINING, "--config", path, "--set", f"{key}={new}")
        assert status == 2 and f"was made with {key} = {old}, now it is {new}" in error
