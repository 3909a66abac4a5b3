"""What is damaged or typed, the command that meets it, the status that is right, and what the line must name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.bed import HALF
from benchmarks.damage import CUT, FLIPS, GONE, JSON, WHOLE, Damage, missing, of_keys, of_table
from benchmarks.typed import TYPED
from landmarks_finetuning.detector import Detector
from study.review.__main__ import command_line, opened

Right = Literal["refused", "failed", "noticed", "same", "any"]
# refused: status 2; failed: 1 or 2; noticed: any, but named; same: named, or the results are those of sound files;
# any: nobody can notice (a bit of a picture's pixels), but what is refused is refused by name


class Command(NamedTuple):
    """A command line, and the files whose content tells whether it did the same."""

    module: str
    arguments: tuple[str, ...]
    results: tuple[str, ...] = ()
    main: Callable[[], object] | None = None

    @property
    def appends(self) -> bool:
        """Whether it may write into files that are there."""
        return self.module.endswith((".train", ".launch")) and "--dry-run" not in self.arguments


class Mistake(NamedTuple):
    """One mistake: what it is called, what is done to which files (glob patterns), what is typed."""

    what: str
    command: str
    right: Right
    names: tuple[str, ...]
    damages: tuple[tuple[str, Damage], ...] = ()
    typed: tuple[str, ...] = ()
    as_nobody: bool = False
    most_mib: float = 3000


def open_review() -> None:
    """The review as far as the page is served."""
    with opened(command_line().parse_args(sys.argv[1:])):
        print("open")


def ask_detector() -> None:
    """What a Python program asks: the points of a picture, which are written to asked.txt."""
    run, image = sys.argv[1:]
    answer = Detector.load(run)([image])[0]
    if not answer.calibrated:
        print("not calibrated: the run has no calibration.json")
    Path("asked.txt").write_text(str((answer.points.tolist(), answer.radius90.tolist(), answer.unit)))


STUDY = ("--config", "study.json")
FRESH = ("--set", "dataset.cache_dir=null")
COMMANDS: dict[str, Command] = {
    "plan": Command("study.launch", (*STUDY, "--dry-run")),
    "plan volumes": Command("study.launch", ("--config", "volumes.json", "--dry-run")),
    "plan hand": Command("study.launch", (*STUDY, "--dry-run", "--set", "dataset.layout=hand", "dataset.root=hand",
                                          "experiment.name=hand")),
    "plan pack": Command("study.launch", (*STUDY, "--dry-run", "--set", "dataset.root=pack.npz",
                                          "experiment.name=packed")),
    "launch": Command("study.launch", STUDY, ("runs/study/report/tables/summary.csv",)),
    "pack": Command("core.data.make_pack", (*STUDY, "--pack", "new.npz", *FRESH)),
    "pack volumes": Command("core.data.make_pack", ("--config", "volumes.json", "--pack", "new.npz")),
    "pretrain": Command("ddpm_pretraining.train", STUDY),
    "sample": Command("ddpm_pretraining.sample", (*STUDY, "--count", "1", "--out", "drawn.png"), ("drawn.png",)),
    "ssl": Command("ssl_baselines.train", STUDY),
    "train": Command("landmarks_finetuning.train", STUDY),
    "train ddpm": Command("landmarks_finetuning.train", (
        *STUDY, "--backbone", "ddpm", "--shots", "2", "--set", "experiment.name=new",
        "finetune.self_training.rounds=0", "finetune.iterations=2",
        "finetune.checkpoint=runs/study/ddpm/ema_iter000004.safetensors"), ("runs/new/landmarks/ddpm/*/*/best.*",)),
    "resume": Command("landmarks_finetuning.train", HALF, ("runs/half/landmarks/scratch/*/*/best.*",)),
    "next round": Command("landmarks_finetuning.train", (*STUDY, "--backbone", "scratch", "--shots", "2")),
    "evaluate": Command("landmarks_finetuning.evaluate", ("trained",), ("trained/predictions.csv",)),
    "predict": Command("landmarks_finetuning.predict", ("trained", "data/images", "--out", "new", "--no-overlays"),
                       ("new/predictions.csv",)),
    "predict alone": Command("landmarks_finetuning.predict", ()),
    "evaluate alone": Command("landmarks_finetuning.evaluate", ()),
    "report": Command("landmarks_finetuning.report.__main__", ("runs/study",),
                      ("runs/study/report/tables/summary.csv",)),
    "report alone": Command("landmarks_finetuning.report.__main__", ()),
    "suggest": Command("landmarks_finetuning.suggest", (*STUDY, "--count", "2", "--out", "new"), ("new/suggest.csv",)),
    "suggest alone": Command("landmarks_finetuning.suggest", STUDY),
    "sample alone": Command("ddpm_pretraining.sample", STUDY),
    "convert": Command("core.formats.convert", ()),
    "weights": Command("core.networks.published_weights", ("convert",)),
    "pack alone": Command("core.data.make_pack", STUDY),
    "launch alone": Command("study.launch", ()),
    "review": Command("study.review.__main__", ("trained", "--images", "data/images", "--port", "0",
                                                "--predictions", "found/predictions.csv"), (), open_review),
    "review alone": Command("study.review.__main__", (), (), open_review),
    "check": Command("study.check.__main__", (*STUDY, "--no-timing", "--out", "new")),
    "check volumes": Command("study.check.__main__", ("--config", "volumes.json", "--no-timing", "--out", "new")),
    "compare": Command("study.compare", ("found/predictions.csv", "trained/predictions.csv", "--out", "new.csv"),
                       ("new.csv",)),
    "compare alone": Command("study.compare", ()),
    "detector": Command("landmarks_finetuning.detector", ("trained", "data/images/p06.png"), ("asked.txt",),
                        ask_detector),
    "detector alone": Command("landmarks_finetuning.detector", (), (), ask_detector),
    "export alone": Command("landmarks_finetuning.export", ())}

RUN = "runs/study/landmarks/scratch/*/shots002_draw0_seed0/"
LOST: dict[str, Damage] = {**WHOLE, **GONE}
CUTS: dict[str, Damage] = {**WHOLE, **GONE, **CUT}
WRONG: tuple[object, ...] = (None, 5, "x", [], {}, ["x"])


UNSEEN = ("unreadable",)  # by a plan whose runs are all done: nothing has changed since
NONE = ("missing", "the header alone")  # images without labels are a data set as well
FAR = ("cell '-5'", "cell '1e9'")  # where a detector's points lie is nobody's mistake


def only(damages: dict[str, Damage], *names: str) -> dict[str, Damage]:
    """Those of these names."""
    return {name: damages[name] for name in names}


def without(damages: dict[str, Damage], *names: str) -> dict[str, Damage]:
    """Those of other names."""
    return {name: damage for name, damage in damages.items() if name not in names}


class Row(NamedTuple):
    """A file, the command that reads it, and what is right after each group of damages."""

    file: str
    command: str
    groups: tuple[tuple[dict[str, Damage], Right], ...]
    typed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # in place of the file's own
    before: tuple[tuple[str, Damage], ...] = ()


def keys(right: Right, **values: tuple[Any, ...]) -> tuple[dict[str, Damage], Right]:
    """The damages of JSON keys; `__` stands for the dot."""
    return of_keys({key.replace("__", "."): wrong for key, wrong in values.items()}), right


def picture(file: str) -> Row:
    """A picture that a study reads, whose pixels carry no checksum."""
    return Row(f"data/images/{file}", "pack", ((LOST, "refused"), (CUT, "any"), (FLIPS, "any")),
               names=(file.split(".")[0],))


def labels(file: str, *groups: tuple[dict[str, Damage], Right], source: str = "", typed: tuple[str, ...] = ()) -> Row:
    """A file of a labelling tool that is converted."""
    return Row(f"labels/{file}", "convert", ((LOST, "refused"), (CUT, "noticed"), *groups),
               (source or f"labels/{file}", "new.csv", "--images", "data/images", "--to", "wide", *typed))


ROWS: tuple[Row, ...] = (
    Row("study.json", "plan", ((CUTS, "refused"), (JSON, "refused"))),
    Row("data/dataset.json", "plan", (
        (without(CUTS, *UNSEEN), "refused"), (JSON, "refused"),
        keys("refused", landmarks=(..., *WRONG, ["a", "a", "b"], ["a", "b"]), spacing_mm=("x", -1, float("nan"), [1]),
             splits=(5, "x", {"train": "x"}, {"train": ["p99"]}, {"train": 5, "validation": 1}),
             patients=(5, "x", {"p99": "one"}), sdr_thresholds=(5, ["x"], [-1], [float("inf")]), other=(1,)))),
    Row("data/landmarks.csv", "plan", ((without(LOST, *UNSEEN), "refused"), (CUT, "any"), (of_table(1), "refused"))),
    Row("data/dataset.splits.json", "plan", ((CUTS, "same"), (JSON, "same"))),
    *map(picture, ("p00.png", "p01.tif", "p02.jpg", "p03.bmp", "p04.dcm", "p05.webp")),
    *(Row(f"volumes/images/{file}", "pack volumes", ((LOST, "refused"), (CUT, "noticed"), (FLIPS, "any")),
          names=(file[:2],)) for file in ("c0.nii.gz", "c1.nii", "c2.nrrd")),
    Row("volumes/images/c3/3.dcm", "pack volumes", ((LOST, "refused"), (CUT, "noticed"), (FLIPS, "any")),
        names=("c3",)),
    Row("volumes/landmarks/c0.mrk.json", "plan volumes", (
        ({**WHOLE, **CUT, "unreadable": GONE["unreadable"], "a link to itself": GONE["a link to itself"]}, "refused"),
        (JSON, "refused"),
        keys("refused", markups=(*WRONG,), markups__0__coordinateSystem=("x", 5), markups__0__controlPoints=(5, "x"),
             markups__0__controlPoints__0__position=(5, ["x", 1, 2], [1, 2], [1e300, 1e300, 1e300], [1, 2, None]),
             markups__0__controlPoints__0__label=(5, "z")))),
    Row("volumes/landmarks/c5.fcsv", "plan volumes", ((WHOLE, "refused"), (CUT, "any"))),
    labels("coco.json", (JSON, "refused"), keys(
        "refused", images=(*WRONG[:3],), annotations=(5, "x"), categories=(..., 5, "x"),
        annotations__0__keypoints=(5, [1], ["x"] * 9, [1e300] * 9), images__0__width=("x", -3, 7))),
    labels("cvat.xml"),
    labels("label_studio.json", (JSON, "refused")),
    labels("landmarks.tps", typed=("--names", "a", "b", "c")),
    labels("landmarks_long.csv", (of_table(3), "noticed")),
    labels("landmarks.csv", (of_table(4), "noticed")),
    Row("labels/labelme/p00.json", "convert", (  # a file of a folder that is missing is missed by nobody
        ({**WHOLE, **{name: damage for name, damage in GONE.items() if name != "missing"}}, "refused"),
        (CUT, "noticed"), (JSON, "noticed"), keys(
            "refused", shapes=(5, "x"), shapes__0__points=(5, [], [["x", 1]], [[1]]), imageWidth=("x", 7)),
        keys("noticed", shapes__0__points=([[-5, 1]], [[1e9, 1]]))),
        ("labels/labelme", "new.csv", "--images", "data/images", "--to", "wide"), names=("p00",)),
    Row("hand/labels/all.csv", "plan hand", ((LOST, "refused"), (of_table(5), "any")),
        names=("test split of hand", "1 labelled images")),  # five images of a hand are too few, however sound
    Row("pack.npz", "plan pack", ((CUTS, "refused"), (FLIPS, "any"))),
    Row("cache/*.npy", "evaluate", ((CUTS, "same"), (FLIPS, "same"))),
    Row("cache/digests.json", "plan", ((CUTS, "same"), (JSON, "same"))),
    Row("cache/leaks_*.json", "plan", ((CUTS, "same"), (JSON, "same"))),
    Row("trained/round1/best.safetensors", "predict", ((CUTS, "refused"), (FLIPS, "same")), names=("round1",)),
    Row("trained/round1/best.safetensors", "evaluate", ((CUT, "refused"), (FLIPS, "same")), names=("round1",)),
    Row("runs/study/ddpm/ema_iter000004.safetensors", "sample", ((CUTS, "refused"), (FLIPS, "same"))),
    Row("runs/study/ddpm/ema_iter000004.safetensors", "train ddpm", ((CUTS, "refused"), (FLIPS, "same"))),
    Row("runs/study/ddpm/ema_iter000004.safetensors", "suggest", ((CUTS, "refused"), (FLIPS, "same"))),
    Row("runs/half/landmarks/scratch/*/*/last.pt", "resume", (({**WHOLE, **CUT}, "refused"), (FLIPS, "same"))),
    Row("runs/half/landmarks/scratch/*/*/config.json", "resume", (({**WHOLE, **CUT}, "noticed"), (JSON, "noticed"))),
    *(Row("trained/config.json", command, ((CUTS, "same"), (JSON, "same")))  # the weights' own header is what they read
      for command in ("predict", "detector")),
    Row("trained/config.json", "review", ((CUTS, "refused"), (JSON, "refused"), keys(
        "refused", dataset=(5, "x", []), experiment=(5, "x"), dataset__root=(5, None)))),
    *(Row("trained/calibration.json", command, ((CUTS, "noticed"), (JSON, "noticed")))
      for command in ("predict", "detector")),
    Row("trained/round1/best.safetensors", "detector", ((CUTS, "refused"), (FLIPS, "same")), names=("round1",)),
    Row("data/images/p06.png", "detector", ((LOST, "refused"), (CUT, "any"))),
    Row("data/dataset.json", "check", ((CUTS, "refused"), (JSON, "refused"))),
    Row("data/landmarks.csv", "check", (
        (without(LOST, *NONE), "refused"), (without(of_table(1), *NONE), "refused"),
        (only({**LOST, **of_table(1)}, *NONE), "noticed"))),
    *(Row(f"data/images/{file}", "check", ((LOST, "noticed"), (CUT, "any")), names=(file.split(".")[0],))
      for file in ("p00.png", "p01.tif", "p04.dcm")),
    Row("volumes/images/c0.nii.gz", "check volumes", ((LOST, "noticed"), (CUT, "noticed")), names=("c0",)),
    Row("volumes/landmarks/c5.fcsv", "check volumes", ((WHOLE, "refused"), (CUT, "any"))),
    Row("found/predictions.csv", "compare", (
        (LOST, "refused"), (CUT, "any"), (without(of_table(3), *FAR), "same"), (only(of_table(3), *FAR), "any"))),
    Row("trained/predictions.csv", "compare", ((LOST, "refused"), (of_table(3), "same"))),
    *(Row(RUN + file, "report", ((CUTS, "noticed"), (JSON, "noticed")), names=(file, "shots002"))
      for file in ("metrics.json", "config.json")),
    Row(RUN + "metrics.json", "report", (keys(
        "noticed", backbone=(..., *WRONG[:4]), physical=(..., 5, "x"), images=(..., "x", -1, 10**30), unit=(..., 5),
        split=(..., 5, []), landmark_names=(..., 5, ["z"]), dataset=(5, "../../x"), physical__mre=("x", 1e300)),),
        names=("metrics.json", "shots002")),
    Row(RUN + "inputs.json", "report", ((CUTS, "same"), (JSON, "same")), names=("inputs.json", "shots002")),
    Row(RUN + "predictions.csv", "report", ((CUTS, "noticed"), (FLIPS, "noticed"), (of_table(2), "noticed"))),
    Row(RUN + "metrics.jsonl", "report", ((CUTS, "same"),)),
    Row(RUN + "pseudo_labels.json", "report", ((CUTS, "same"), (JSON, "same"))),
    Row(RUN + "calibration.json", "report", ((CUTS, "same"),)),
    *(Row(RUN + file, "launch", ((LOST, "same"),), names=(file, "shots002"))
      for file in ("metrics.json", "config.json", "inputs.json", "metrics.jsonl", "scored.json")),
    Row("runs/study/ddpm/metrics.jsonl", "launch", ((LOST, "same"),)),
    Row("runs/study/data_checked", "launch", ((LOST, "same"),)),
    Row(RUN + "pseudo_labels.npz", "next round", ((CUTS, "any"), (FLIPS, "any")),
        before=((RUN + "round1/best.safetensors", missing),)),
    Row("found/predictions.csv", "review", ((CUTS, "noticed"), (of_table(2), "refused"))))


def mistakes() -> Iterator[Mistake]:
    """All of them, row by row, then what is typed."""
    for row in ROWS:
        names = (*row.names, row.file.rpartition("/")[2].replace("*.npy", "cache").replace("*", ""))
        for group, right in row.groups:
            for what, damage in group.items():
                wanted = (*names, what.split(" ")[0].split(".")[-1]) if " is " in what else names
                yield Mistake(f"{Path(row.file).name}: {what}", row.command, right, wanted,
                              (*row.before, (row.file, damage)), row.typed, what == "unreadable")
    for command, typed, name in TYPED:
        yield Mistake(f"typed: {name}", command, "refused", (name,), (), tuple(typed))
