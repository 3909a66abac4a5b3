"""The report against hand-computed numbers: tables, verdicts and the page."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.errors import RunsFailed, UserError
from core.training.run_log import read_metrics
from landmarks_finetuning.report import __main__ as report_command
from landmarks_finetuning.report import build
from landmarks_finetuning.report.build import build_report
from landmarks_finetuning.report.collect import aggregate, compare, read_experiment, select
from landmarks_finetuning.report.findings import comparisons, verdict
from landmarks_finetuning.statistics import bootstrap_interval

NAMES = ("Sella", "Nasion")
THRESHOLDS = (2.0, 2.5)


def write_run(root: Path, backbone: str, shots: int, draw: int, errors: list[list[float]], **changes) -> Path:
    """A scored run whose errors (images x landmarks) are given; NaN is a landmark without annotation."""
    folder = root / "landmarks" / backbone / "default" / f"shots{shots:03d}_draw{draw}_seed0"
    (folder / "overlays").mkdir(parents=True)
    values = np.array(errors, dtype=float)
    scored = values[~np.isnan(values)]
    physical = {"mre": scored.mean(), "std": scored.std(), "median": np.median(scored),
                "p95": np.percentile(scored, 95), "sdr": {f"{t:g}": 100 * (scored <= t).mean() for t in THRESHOLDS},
                "count": len(scored), "per_landmark": {"mre": np.nanmean(values, axis=0).tolist()},
                "interval": [scored.mean() - 0.5, scored.mean() + 0.5]}
    metrics = {"dataset": "cephalo", "layout": "cephalo", "paper_rule": "cephalo", "phantom": False, "split": "test",
               "backbone": backbone, "variant": "default", "shots": shots, "draw": draw, "seed": 0, "unit": "mm",
               "training_images": ["t"] * shots, "validation_labels": 20, "images": len(values), "decoder": "argmax",
               "landmark_names": NAMES, "seconds": 60.0, "physical": physical, "paper": physical, **changes}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps({"experiment": {"name": root.name}, "environment": {"python": "3"}}))
    rows = [{"image": f"{m:03d}", "patient": "", "landmark": name, "x": 1, "y": 2, "truth_x": 1, "truth_y": 2,
             "error": values[m, n], "paper_error": values[m, n], "confidence": 0.5}
            for m in range(len(values)) for n, name in enumerate(NAMES)]
    pd.DataFrame(rows).to_csv(folder / "predictions.csv", index=False)
    Image.new("RGB", (40, 30)).save(folder / "overlays" / "rank001_000.png")
    (folder / "metrics.jsonl").write_text(
        '{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0, "validation_loss": 1.5, "validation_mre": 3.0}\n')
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two draws of ddpm (means 2 and 3) and scratch (means 3 and 5) at 10 labels; one ddpm run at 1 label."""
    root = tmp_path_factory.mktemp("runs") / "study"
    write_run(root, "ddpm", 10, 0, [[1, 3], [2, 2]])
    write_run(root, "ddpm", 10, 1, [[3, 3], [np.nan, 3]])
    write_run(root, "scratch", 10, 0, [[2, 4], [3, 3]])
    write_run(root, "scratch", 10, 1, [[5, 5], [np.nan, 5]])
    write_run(root, "ddpm", 1, 0, [[9, 9], [9, 9]])
    unfinished = root / "landmarks" / "ddpm" / "default" / "shots010_draw2_seed0"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text('{"step": 340, "loss": 1.0}\n{"step": 36')
    (root / "ddpm" / "samples").mkdir(parents=True)
    (root / "ddpm" / "metrics.jsonl").write_text(
        '{"step": 20, "loss": 0.5}\n{"step": 40, "loss": 0.2}\n'
        '{"step": 40, "validation_loss": 0.3, "validation_loss_q1": 0.9}\n{"st')
    Image.new("L", (64, 32)).save(root / "ddpm" / "samples" / "samples_iter000040.png")
    return root


@pytest.fixture(scope="module")
def page(experiment: Path) -> Path:
    """The built page of `experiment`."""
    return build_report([experiment])


def row_of(summary: pd.DataFrame, backbone: str, shots: int) -> pd.Series:
    return select(summary, backbone, "default", shots).iloc[0]


def test_aggregate_means_and_spread_over_draws(experiment):
    row = row_of(aggregate(read_experiment(experiment).runs), "ddpm", 10)
    assert row["mre"] == pytest.approx((2 + 3) / 2)
    assert row["mre_spread"] == pytest.approx(np.sqrt(0.5))  # of 2 and 3, n - 1
    assert row["sdr_2"] == pytest.approx((75 + 0) / 2)
    assert (row["draws"], row["runs"], row["validation_labels"]) == (2, 2, 20)


def test_labels_that_choose_are_not_told_twice(tmp_path):
    """Of ten labels two choose the best step: eight train."""
    write_run(tmp_path / "study", "ddpm", 10, 0, [[1, 3]], training_images=["t"] * 8, validation_labels=2)
    row = row_of(aggregate(read_experiment(tmp_path / "study").runs), "ddpm", 10)
    assert (row["labelled"], row["validation_labels"]) == (8, 2)
    page = build_report([tmp_path / "study"]).read_text(encoding="utf8")
    assert '<td>8<span class="soft" title="validation labels"> + 2</span>' in page


def test_one_draw_has_an_interval_over_patients_and_no_spread(tmp_path):
    errors = [[1, 2], [3, 4], [2, 2], [5, 1], [2, np.nan]]
    write_run(tmp_path / "s", "ddpm", 1, 0, errors)
    row = aggregate(read_experiment(tmp_path / "s").runs).iloc[0]
    low, high = bootstrap_interval(np.array(errors, dtype=float), range(5), seed=0)
    assert (row["interval_low"], row["interval_high"]) == (low, high)
    assert row["mre"] == pytest.approx(22 / 9) and low < 22 / 9 < high
    assert row["macro_mre"] == pytest.approx((13 / 5 + 9 / 4) / 2)
    assert np.isnan(row["mre_spread"])


def test_seeds_are_averaged_within_their_draw(tmp_path):
    first = write_run(tmp_path / "s", "ddpm", 5, 0, [[1, 1]])
    write_run(tmp_path / "s", "ddpm", 5, 1, [[7, 7]])
    other = write_run(tmp_path / "other", "ddpm", 5, 0, [[3, 3]], seed=1)
    other.rename(first.with_name("shots005_draw0_seed1"))
    row = row_of(aggregate(read_experiment(tmp_path / "s").runs), "ddpm", 5)
    assert row["mre"] == pytest.approx(((1 + 3) / 2 + 7) / 2)
    assert row["mre_spread"] == pytest.approx(5 / np.sqrt(2))


def test_compare_pairs_draws_and_images(experiment):
    runs = read_experiment(experiment).runs
    result = compare(select(runs, "ddpm", "default", 10), select(runs, "scratch", "default", 10))
    assert result["difference"] == pytest.approx((1 + 2) / 2)  # rival minus method, draw by draw
    assert (result["draws"], result["draws_won"]) == (2, 2)
    assert result["spread"] == pytest.approx(np.sqrt(0.5))
    assert np.isnan([result["low"], result["high"]]).all()  # two patients say nothing
    assert result["p"] == 2 / 4  # nor can their signs: ++ and -- of four patterns


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "better"),
    ({"p_holm": 0.06}, "open"),  # not after the correction
    ({"p_holm": 0.06, "patients": 7}, "few"),  # nor could it be
    ({"patients": 7}, "better"),  # not the family's smallest p-value, which Holm corrects less
    ({"p_holm": 0.06, "patients_needed": np.inf}, "few"),
    ({"low": np.nan, "high": np.nan}, "open"),  # no interval
    ({"low": -0.1}, "open"),  # the interval over patients has 0
    ({"draws_won": 2}, "open"),  # a draw disagrees
    ({"spread": 1.5}, "open"),  # the draws differ by more than the gain
    ({"difference": -1.0, "low": -1.2, "high": -0.8, "draws_won": 0}, "worse"),
    ({"draws": 1, "draws_won": 1, "spread": np.nan}, "better"),
])
def test_verdict(changes, expected):
    assert verdict({"difference": 1.0, "low": 0.8, "high": 1.2, "patients": 8, "draws": 3, "draws_won": 3,
                    "patients_needed": 8, "p_holm": 0.04, "spread": 0.5} | changes) == expected


def test_a_loss_of_pretraining_is_said(tmp_path):
    root = tmp_path / "study"
    write_run(root, "ddpm", 5, 0, [[4, 4], [4.2, 4], [4.2, 4], [4, 4], [4.1, 4], [4.04, 4.04]])
    write_run(root, "scratch", 5, 0, [[2, 2]] * 6)
    found = comparisons(read_experiment(root).runs, aggregate(read_experiment(root).runs))
    assert found["verdict"].tolist() == ["worse"]
    html = build_report([root]).read_text(encoding="utf8")
    assert "is clearly worse for this draw of the labels at 5 labels" in html
    assert "2.05 mm (102%) worse for this draw of the labels." in html and "clear loss for this draw" in html
    assert "one draw of the labels" in html


def test_few_patients_name_no_winner(tmp_path):
    write_run(tmp_path / "study", "ddpm", 5, 0, [[2, 2]] * 4)
    write_run(tmp_path / "study", "scratch", 5, 0, [[4, 4]] * 4)
    html = build_report([tmp_path / "study"]).read_text(encoding="utf8")
    assert "4 test images are too few to tell (needed here: 6)." in html and "clearly" not in html
    assert "cannot be judged on so few test images at 5 labels" in html
    assert "test patients for one comparison, needed here: 6)" in html


def test_tables_hold_the_numbers(experiment, page):
    assert page == experiment / "report" / "index.html"
    tables = page.parent / "tables"
    summary = pd.read_csv(tables / "summary.csv")
    assert row_of(summary, "scratch", 10)["mre"] == pytest.approx(4.0)
    landmarks = pd.read_csv(tables / "per_landmark.csv").set_index("landmark")
    assert list(landmarks.index) == list(NAMES)
    assert landmarks.loc["Sella", "ddpm"] == pytest.approx((1 + 2 + 3) / 3)  # the NaN is not scored
    assert landmarks.loc["Nasion", "scratch"] == pytest.approx((4 + 3 + 5 + 5) / 4)
    assert len(pd.read_csv(tables / "runs.csv")) == 5
    assert len(list((page.parent / "figures").glob("*.png"))) == 6


def test_the_page_is_self_contained(page):
    html = page.read_text(encoding="utf8")
    attributes = r"""\s(?:src|srcset|href|xlink:href|data|action)=["']?([^"'\s>]+)"""
    loads = re.findall(attributes + r"""|url\(["']?([^)"']+)|@import\s+(\S+)""", html)
    addresses = [next(filter(None, found)) for found in loads]
    assert addresses
    assert not [a for a in addresses if not a.startswith(("#", "data:"))]
    assert "data:image/jpeg;base64," in html
    assert len(re.findall(r"<svg", html)) == 6
    assert "mean radial error (mm)" in html  # figures keep their text as text


def test_unfinished_runs_are_listed(page):
    assert "Unfinished runs (1)" in page.read_text(encoding="utf8")
    assert pd.read_csv(page.parent / "tables" / "unfinished.csv")["last_step"].tolist() == [340]


def test_an_experiment_with_nothing_scored_still_has_a_page(tmp_path):
    (tmp_path / "landmarks" / "ddpm" / "default" / "shots001_draw0_seed0").mkdir(parents=True)
    assert "No detector of this experiment is scored yet" in build_report([tmp_path]).read_text(encoding="utf8")


def test_several_experiments_share_a_page_and_names_are_escaped(tmp_path):
    write_run(tmp_path / "first", "ddpm", 10, 0, [[1, 1]], dataset="<script>alert(1)</script>")
    write_run(tmp_path / "second", "ddpm", 10, 0, [[1, 1]], dataset="chest", paper_rule="chest", unit="px")
    html = build_report([tmp_path / "first", tmp_path / "second"]).read_text(encoding="utf8")
    assert "chest · second" in html
    assert "alert(1)" in html
    assert "<script>alert" not in html


@pytest.mark.parametrize("make", [True, False])
def test_folder_without_runs_is_a_user_error(tmp_path, make):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match="empty.*(holds no runs|does not exist)"):
        build_report([folder])


def test_missing_predictions_are_a_user_error(tmp_path):
    (write_run(tmp_path, "ddpm", 10, 0, [[1, 1]]) / "predictions.csv").unlink()
    with pytest.raises(RunsFailed, match=r"predictions\.csv is missing"):
        build_report([tmp_path])


def without_line(text: str, line: int) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[:line] + lines[line + 1:])


@pytest.mark.parametrize("key, value", [("dataset", "another"), ("backbone", "scratch"), ("shots", 5), ("draw", 1)])
def test_figures_of_another_run_are_named(tmp_path, key, value):
    folder = write_run(tmp_path, "ddpm", 10, 0, [[1, 1], [2, 2], [3, 3]])
    made = {"dataset": "cephalo", "backbone": "ddpm", "shots": 10, "draw": 0, "seed": 0}
    (folder / "config.json").write_text(json.dumps({"run": made}))
    assert not read_experiment(tmp_path).damaged
    (folder / "config.json").write_text(json.dumps({"run": made | {key: value}}))
    run, = read_experiment(tmp_path).damaged
    assert f"its {key} is {json.dumps(made[key])}, that of config.json {json.dumps(value)}" in run.reason


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text[: text.rindex(",")],  # the last row lacks a cell
    lambda text: text[:-2],  # the last number lacks a digit
    lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    lambda text: "".join(text.splitlines(keepends=True)[:-2]),  # all of the last image
    lambda text: without_line(text, 2),
    lambda text: without_line(text, 2) + text.splitlines(keepends=True)[1],  # a row twice
    lambda text: text.replace("Nasion", "Nasion?", 1),
    lambda text: text.replace(",Sella,1,2,", ",Sella,1", 1),  # a row of fewer cells
    lambda text: text.replace(",Sella,1,2,", ",Sella,1,2,0,", 1),
    lambda text: text.replace(",Sella,1,2,", ",Sella,1..,2,", 1),
    lambda text: text.splitlines(keepends=True)[0],
    lambda text: text.replace("patient", "patiant", 1),
    lambda text: "",
    lambda text: "image,landmar",
    lambda text: text + text,
    lambda text: text.replace(",Sella,1,2,1,2,1.0", ",Sella,1,2,1,2,1.5", 1),
    lambda text: text.replace("000,,Sella,1,2", "000,,Sella,1,3", 1),
    lambda text: text.encode("utf-16").decode("latin-1"),
], ids=["half", "cell", "digit", "row", "image", "a row within", "a row twice", "another name", "a short row",
        "a long row", "no number", "head alone", "another column", "empty", "half a head",
        "doubled", "another error", "another place", "another encoding"])
def test_changed_predictions_are_named_and_not_reported(tmp_path, damage):
    path = write_run(tmp_path, "ddpm", 10, 0, [[1, 1], [2, np.nan], [3, 3]]) / "predictions.csv"
    write_run(tmp_path, "scratch", 10, 0, [[4, 4], [4, 4], [4, 4]])
    digested(path)
    assert not read_experiment(tmp_path).damaged
    path.write_text(damage(path.read_text()), encoding="latin-1")
    experiment = read_experiment(tmp_path)
    (run,) = experiment.damaged
    assert run.folder == path.parent and run.reason.startswith(f"{path} ") and "\n" not in run.reason
    assert re.search(r"(is cut or damaged|is not a table|was changed since).*; evaluate that run again$", run.reason)
    assert experiment.runs["backbone"].tolist() == ["scratch"]


@pytest.mark.parametrize("how", ["gone", "a link to nowhere"])
def test_figures_that_are_gone_are_named(tmp_path, how):
    """A run that is still to be scored is unfinished, one that was scored is damaged."""
    lost, other = (write_run(tmp_path, "ddpm", 10, draw, [[1, 1], [2, 2], [3, 3]]) for draw in (0, 1))
    for folder in (lost, other):
        (folder / "metrics.json").unlink()
    if how == "gone":
        (lost / "scored.json").write_text("{}")
    else:
        (lost / "metrics.json").symlink_to(tmp_path / "nowhere")
    experiment = read_experiment(tmp_path)
    (run,) = experiment.damaged
    assert run.folder == lost and run.reason.startswith(f"{lost / 'metrics.json'} is gone, and it was scored; ")
    assert experiment.unfinished["draw"].tolist() == [1]


def test_a_damaged_run_is_named_on_the_page_and_by_the_command(tmp_path):
    """The page has the other run alone, and the launch or command ends in status 1."""
    path = write_run(tmp_path, "ddpm", 10, 0, [[1, 1]]) / "predictions.csv"
    write_run(tmp_path, "scratch", 10, 0, [[4, 4]])
    path.write_text("")
    with pytest.raises(RunsFailed) as caught:
        build_report([tmp_path])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"  {path.parent}: {path} ")
    page = (tmp_path / "report/index.html").read_text()
    assert "1 run is left out of every figure" in page and "evaluate that run again" in page
    assert pd.read_csv(tmp_path / "report/tables/runs.csv")["backbone"].tolist() == ["scratch"]


def digested(path):
    """metrics.json says of which table it is, as scoring writes it."""
    metrics = json.loads((path.parent / "metrics.json").read_text())
    metrics["predictions_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "metrics.json").write_text(json.dumps(metrics))


def test_without_a_digest_count_and_mean_are_compared(tmp_path):
    """Of runs scored before there was one."""
    path = write_run(tmp_path, "ddpm", 10, 0, [[1, 1], [2, np.nan], [3, 3]]) / "predictions.csv"
    path.write_text(path.read_text().replace(",3.0,3.0", ",3.1,3.1", 1))
    (run,) = read_experiment(tmp_path).damaged
    assert "the mean of its 5 errors is 2.0200, that of metrics.json, of 5, is 2.0000" in run.reason


@pytest.mark.parametrize(("name", "content"), [
    ("metrics.json", b""), ("metrics.json", b"[1]"), ("metrics.json", b'{"physical": 3, "images": 1}'),
    ("metrics.json", b"\xff\xfe{"), ("metrics.json", b"[" * 100_000), ("config.json", b"{"), ("config.json", b"\xff"),
    ("inputs.json", b"{"), ("inputs.json", b"{}"), ("predictions.csv", b"\xff\xfe\x00"),
])
def test_a_damaged_file_of_one_run_leaves_the_others(tmp_path, name, content):
    folder = write_run(tmp_path, "ddpm", 10, 0, [[1, 1]])
    write_run(tmp_path, "scratch", 10, 0, [[4, 4]])
    (folder / name).write_bytes(content)
    experiment = read_experiment(tmp_path)
    (run,) = experiment.damaged
    assert run.folder == folder and str(folder / name) in run.reason and "\n" not in run.reason
    assert experiment.runs["backbone"].tolist() == ["scratch"]


def test_a_name_that_is_no_text_is_damage(tmp_path):
    folder = write_run(tmp_path, "ddpm", 10, 0, [[1, 1]])
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"dataset": 5}))
    (run,) = read_experiment(tmp_path).damaged
    assert "metrics.json is damaged (TypeError('a name is no text'))" in run.reason


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    folder = write_run(tmp_path, "ddpm", 10, 0, [[1, 1]])
    (folder / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": 3, "validation_loss": 1.0}\n{"s')
    assert read_metrics(folder / "metrics.jsonl") == [{"step": 3, "validation_loss": 1.0}]
    assert not read_experiment(tmp_path).damaged


def test_an_earlier_reports_tables_stay_until_the_new_ones_are_whole(tmp_path, monkeypatch):
    write_run(tmp_path, "ddpm", 10, 0, [[1, 1]])
    report = build_report([tmp_path]).parent
    before = {path.name: path.read_bytes() for path in (report / "tables").iterdir()}
    (report / "tables/old.csv").write_text("of an earlier report")
    with monkeypatch.context() as patch:
        patch.setattr(build, "page_filters", lambda pages: 1 / 0)  # after all tables
        with pytest.raises(ZeroDivisionError):
            build_report([tmp_path])
    assert {path.name for path in (report / "tables").iterdir()} == {*before, "old.csv"}
    build_report([tmp_path])
    assert {path.name: path.read_bytes() for path in (report / "tables").iterdir()} == before
    assert sorted(path.name for path in report.iterdir()) == ["figures", "index.html", "tables"]


def test_two_reports_at_once(tmp_path, monkeypatch):
    """The second command waits for the first one."""
    write_run(tmp_path, "ddpm", 10, 0, [[1, 1]])
    inside, seen = [], []

    def slow(folders):
        inside.append(folders)
        time.sleep(0.3)
        seen.append(len(inside))
        inside.pop()
        return tmp_path

    monkeypatch.setattr(report_command, "build_report", slow)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    threads = [threading.Thread(target=report_command.main) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1]
