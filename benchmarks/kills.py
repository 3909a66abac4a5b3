"""kill -9 at drawn moments, the same command again until it is done: the same results as of an uninterrupted run?

Killed are a launcher alone, with its process group and with its workers, workers of `--workers 2`, the second of two
launchers, what makes phantoms, `predict`, `core.formats.convert`, and the review's server while it saves labels.
Compared are weights, predictions.csv, metrics.json, metrics.jsonl and all other files that hold no times; labels and
journal of the review; converted files. Counted are files that are lost, that differ, or that are left over (temporary
ones, locks, processes), commands that are stuck or refuse to go on, and tracebacks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from benchmarks.bed import STUDY, write_pictures
from benchmarks.killing import (
    Child,
    Ended,
    Strike,
    Whom,
    adopt_orphans,
    children,
    contents,
    copy_of,
    left_over,
    orphans,
    same,
)
from core.errors import CommandParser, UserError, run_command
from core.files import JUST_SECONDS
from core.formats.label_files import FORMATS, IN_SPACE, Images, read_label_file, resolved, write_label_file

PRELOADED = ("torch._dynamo", "tensorboard.compat.tensorflow_stub", "matplotlib.pyplot", "landmarks_finetuning.train",
             "landmarks_finetuning.evaluate", "ddpm_pretraining.train", "landmarks_finetuning.predict",
             "landmarks_finetuning.report.build", "study.launch", "study.check.launched", "study.review.__main__",
             "core.formats.convert", "torch.utils.tensorboard", "core.phantoms.radiographs")
LAUNCH = ("study.launch", "--config", "study.json", "--stages", "pretrain", "finetune")
REPORT = ("study.launch", "--config", "study.json")
PHANTOM = ("study.launch", "--config", "phantom.json", "--dry-run")
PREDICT = ("landmarks_finetuning.predict", "trained", "data/images", "--out", "predicted", "--format", "coco",
           "labelme", "tps")
WORKERS = ("--workers", "2")
FAULTS = ("lost", "mismatched", "stuck", "left over", "traceback")
AT_MOST = 12  # kills of one study
SHOWN = 300  # characters of what went wrong


class Kind(NamedTuple):
    """What is killed: a command, who of it, the share of all kills, and the files that are compared."""

    command: tuple[str, ...]
    share: float
    results: tuple[str, ...]
    victims: tuple[str, ...] = ("",)  # processes: the command itself, or workers
    whom: tuple[Whom, ...] = ("alone",)
    beside: bool = False  # the victim is a second one beside another


RUNS = ("runs", "cache")
KINDS: dict[str, Kind] = {
    "launcher": Kind(LAUNCH, 0.22, RUNS),
    "launcher with its group": Kind(LAUNCH, 0.08, RUNS, whom=("group",)),
    "launcher and report": Kind(REPORT, 0.06, RUNS),
    "workers": Kind((*LAUNCH, *WORKERS), 0.14, RUNS, ("worker 1", "worker 2")),
    "launcher of workers": Kind((*LAUNCH, *WORKERS), 0.1, RUNS, whom=("alone", "group", "workers too")),
    "second launcher": Kind(LAUNCH, 0.1, RUNS, beside=True),
    "phantom": Kind(PHANTOM, 0.04, ("phantom",)),
    "predict": Kind(PREDICT, 0.1, ("predicted",)),
    "convert": Kind(("core.formats.convert",), 0.08, ("converted",)),
    "review": Kind(("study.review",), 0.08, ()),
}


class Whole(NamedTuple):
    """An uninterrupted run: its results, writes and seconds."""

    results: dict[str, object]
    writes: int
    seconds: float


class Killing:
    """The kills of one kind, one study after the other, in `work`, which is `bed` copied."""

    def __init__(self, name: str, bed: Path, work: Path, rng: random.Random) -> None:
        self.name, self.kind, self.bed, self.work, self.rng = name, KINDS[name], bed, work, rng
        self.own = children()  # such as what multiprocessing keeps
        self.counts: Counter[str] = Counter()
        self.whole: dict[tuple[str, ...], Whole] = {}

    def fault(self, which: str, said: str) -> None:
        """Count one, and say it."""
        self.counts[which] += 1
        print(f"{which} | {self.name} | {said[-SHOWN:]}", flush=True)

    def fresh(self) -> None:
        """Nothing done yet."""
        os.chdir(self.bed.parent)
        copy_of(self.bed, self.work)
        os.chdir(self.work)

    def uninterrupted(self, command: tuple[str, ...]) -> Whole:
        """The results of a command that nobody kills; its first process' writes."""
        if command not in self.whole:
            self.fresh()
            begun = time.monotonic()
            ended = Child(Path("log.txt"), *command).wait()
            if ended.status:
                raise UserError(f"{' '.join(command)} ended with {ended.status}: {ended.said[-SHOWN:]}")
            seconds = time.monotonic() - begun
            self.whole[command] = Whole(contents(*map(Path, self.kind.results)), ended.writes, seconds)
        return self.whole[command]

    def strikes(self, whole: Whole) -> list[Strike]:
        """One for the command, or for one or both of its workers; every fifth by time alone."""
        drawn = []
        victims = self.kind.victims if self.rng.random() < 0.6 else self.rng.sample(self.kind.victims, 1)
        reach = 1.0 if len(self.kind.results) == 1 else 0.3  # of all; more is left of a study than is over
        for process in victims:
            if self.rng.random() < 0.2:
                writes, seconds = 0, self.rng.uniform(0, reach * whole.seconds)
            else:
                writes = 1 + int(self.rng.random() ** 1.5 * reach * max(whole.writes, 100 if process else 1))
                seconds = self.rng.choice((0.0, 0.0, self.rng.expovariate(1 / 0.003)))
            drawn.append(Strike(process, writes, seconds, self.rng.choice(self.kind.whom)))
        return drawn

    def run(self, command: tuple[str, ...], strikes: list[Strike]) -> Ended:
        """The command, struck; where it is the second of two, the end of the first."""
        if not self.kind.beside or not strikes:
            ended = Child(Path("log.txt"), *command, strikes=strikes).wait()
            killed = ended.said.count("was killed by SIGKILL") if strikes and strikes[0].process else ended.killed
            allowed = (0, 1) if killed == len(WORKERS) else (0,)
        else:
            first = Child(Path("log.txt"), *command)
            second = Child(Path("log2.txt"), *command, strikes=strikes).wait()
            killed, allowed = second.killed, (0,)
            self.judge(second, allowed)
            ended = first.wait()
        self.counts["kills"] += killed
        self.judge(ended, allowed)
        return ended

    def judge(self, ended: Ended, allowed: tuple[int, ...]) -> None:
        """Count what is wrong with how a command ended."""
        if "Traceback (most recent call last)" in ended.said:
            self.fault("traceback", ended.said)
        elif ended.status is None or not (ended.killed or ended.status in allowed):
            self.fault("stuck", f"status {ended.status}: {ended.said.strip()}")

    def one(self, command: tuple[str, ...], most: int, until: float) -> None:
        """One study, killed at most so many times, and before `until`; then done and compared."""
        whole = self.uninterrupted(command)
        self.fresh()
        for number in range(AT_MOST + 2):
            done = self.counts["kills"]
            struck = number < min(most, AT_MOST) and time.monotonic() < until
            strikes = self.strikes(whole) if struck else []
            if self.name == "convert":
                time.sleep(1.1 * JUST_SECONDS)  # a person is no faster
            if self.done_before(command) or (self.run(command, strikes).status == 0 and self.counts["kills"] == done):
                break
        self.compare(command, whole)

    def done_before(self, command: tuple[str, ...]) -> bool:
        """Whether the command was killed when all was done, and would only say that it is."""
        return self.name == "convert" and Path(command[2]).exists()

    def compare(self, command: tuple[str, ...], whole: Whole) -> None:
        """Count what is lost, other or left over."""
        for _ in range(orphans(self.own)):
            self.fault("left over", "a process")
        folders = [Path(name) for name in self.kind.results]
        if left_over(Path()):
            time.sleep(1.1 * JUST_SECONDS)
            if not self.done_before(command):
                self.run(command, [])
        for path in left_over(Path()):
            self.fault("left over", path)
        found = contents(*folders)
        for path, content in whole.results.items():
            if path.endswith("previous.pt"):
                continue  # of whichever step was saved last but one
            if path not in found:
                self.fault("lost", path)
            elif not same(found[path], content):
                self.fault("mismatched", path)
        for path in found.keys() - whole.results.keys() - set(left_over(*folders)):
            self.fault("left over", path)
        for log in Path("runs").rglob("logs/*.log"):
            if "Traceback" in log.read_text():
                self.fault("traceback", log.read_text())


def commands(name: str) -> Iterator[tuple[str, ...]]:
    """The commands of a kind, in turn, for ever."""
    if name != "convert":
        return cycle([KINDS[name].command])
    sources = sorted(path for path in Path("labels").iterdir())
    targets = [FORMATS[kind].place for kind in FORMATS if kind not in IN_SPACE]
    kinds = [kind for kind in FORMATS if kind not in IN_SPACE]
    return cycle([("core.formats.convert", str(Path("labels") / source), f"converted/{place}", "--to", kind,
                   "--images", "data/images", "--names", "a", "b", "c")
                  for source in ("coco.json", "landmarks.csv") if Path("labels", source) in sources
                  for place, kind in zip(targets, kinds, strict=True)])


def make_bed(bed: Path) -> None:
    """Data, labels in all formats, configs, and a trained run that moments do not touch."""
    bed.mkdir()
    os.chdir(bed)
    write_pictures(Path("data"))
    table, images = Path("data/landmarks.csv"), Images(Path("data/images"))
    labels = resolved(read_label_file(table, images=images), images, table)
    for kind in ("coco", "wide"):
        write_label_file(Path("labels") / FORMATS[kind].place, labels, kind, images)
    study = {**STUDY, "finetune": {**STUDY["finetune"], "self_training": {"rounds": 0}}}
    Path("study.json").write_text(json.dumps(study))
    data = {"layout": "cephalo", "root": "phantom", "phantom": {"count": 152, "size": [96, 78]}, "spacing_mm": 2.5}
    Path("phantom.json").write_text(json.dumps({**study, "dataset": {**data, "image_size": [32, 32]}}))
    ended = Child(Path("log.txt"), *LAUNCH).wait()
    if ended.status:
        raise UserError(f"the study was not made: {ended.said[-SHOWN:]}")
    shutil.copytree(next(Path("runs/study/landmarks/scratch").glob("*/shots*")), "trained")
    for name in RUNS:
        shutil.rmtree(name)


def kill_all(folder: Path, names: list[str], kills: int, seconds: float, seed: int) -> dict[str, Counter[str]]:
    """Kills of each kind in its share until there are so many, or the time is up."""
    bed, counts = folder / "bed", dict[str, Counter[str]]()
    make_bed(bed)
    end = time.monotonic() + seconds
    whole = sum(KINDS[name].share for name in names)
    for number, name in enumerate(names):
        if time.monotonic() > end:
            break
        wanted = max(1, round(kills * KINDS[name].share / whole))
        if name == "review":
            counts[name] = reviews(folder, wanted, seed)
            continue
        os.chdir(bed)
        killing, order = Killing(name, bed, folder / "work", random.Random(f"{seed} {name}")), commands(name)
        begun, left = time.monotonic(), sum(KINDS[each].share for each in names[number:])
        until = begun + (end - begun) * KINDS[name].share / left  # its share of the time that is left
        while killing.counts["kills"] < wanted and time.monotonic() < until:
            killing.one(next(order), wanted - killing.counts["kills"], until)
            killing.counts["rounds"] += 1
        counts[name] = killing.counts
        print(f"{name}: {dict(killing.counts)} in {time.monotonic() - begun:.0f} s", flush=True)
    return counts


def reviews(folder: Path, wanted: int, seed: int) -> Counter[str]:
    """The kills of benchmarks.review."""
    from benchmarks.review import kill_reviews  # needs selenium

    done = kill_reviews(folder, wanted, seed, 0.5)
    print(f"review: {done}", flush=True)
    return Counter({"kills": done.kills, "lost": done.lost, "mismatched": done.wrong, "left over": done.left})


def main() -> None:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.kills", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter,
                           epilog='example: python -m benchmarks.kills --kills 20 --only launcher predict')
    parser.add_argument("--kills", type=int, default=200, help="how many, over all kinds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="kinds")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has none of the threads of this one
    for module in PRELOADED:
        importlib.import_module(module)
    adopt_orphans()
    before = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_all(Path(folder), arguments.only, arguments.kills, arguments.seconds, arguments.seed)
        os.chdir("/")
    total = sum(counts.values(), Counter())
    print(f"{total['kills']} kills (seed {arguments.seed}) in {time.monotonic() - before:.0f} s: "
          f"{', '.join(f'{total[fault]} {fault}' for fault in FAULTS)}")
    if any(total[fault] for fault in FAULTS):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
