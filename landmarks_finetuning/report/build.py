"""Build the report: one self-contained HTML page, tables/*.csv and figures/*.png below the experiment's report/."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from core.errors import RunsFailed
from core.files import write_atomically
from core.formats.cells import harmless
from landmarks_finetuning.report import figures, paper_figures
from landmarks_finetuning.report.best import best_run
from landmarks_finetuning.report.collect import (
    Experiment,
    aggregate,
    per_landmark,
    read_experiment,
    sdr_columns,
)
from landmarks_finetuning.report.confidence import confidences
from landmarks_finetuning.report.confidence_figure import confidence_figure
from landmarks_finetuning.report.filters import page_filters, published_names, row_keys
from landmarks_finetuning.report.findings import (
    HUMAN,
    UNTRAINED,
    comparisons,
    display_name,
    headline,
    leak_sentence,
    p_text,
    release_sentence,
    rule_sentence,
    selection_sentence,
    sentences,
    setting_sentence,
    shots_text,
    verdict_text,
)
from landmarks_finetuning.report.frames import grouped, named_rows, records
from landmarks_finetuning.report.heatmap_figure import heatmap_rows, whole_figure
from landmarks_finetuning.report.iterations import (
    choice_sentence,
    iteration_means,
    main_family,
    training_petaflop,
    with_chosen,
)
from landmarks_finetuning.report.pictures import Pictures, embed_cases, find_cases, worst_cases
from landmarks_finetuning.report.pretraining import pretraining_sentence
from landmarks_finetuning.report.rounds import round_rows
from landmarks_finetuning.report.ssl_figures import read_ssl, ssl_curves
from landmarks_finetuning.report.tables import latex_table, metric_title, paper_tables, scorer_sentence, wide_rows
from landmarks_finetuning.report.unscored import unscored_cases

HERE = Path(__file__).parent
NAME_BYTES = 190  # of what figures are called after
TEMPLATE = "page.html.j2"
NEW = ".new"  # below the report's folder: its next tables and figures
STRIP = ("Noise removed in one step, from more and more of it: the diffusion’s time runs from left (little noise) to "
         "right (nothing else), so sampling goes from right to left. Three rows for each of two images: what the "
         "network is shown, the image that it makes of it, four times the error")
HEATMAPS_WIDTH = 1100  # pixels of an embedded row of heatmaps


@dataclass
class Output:
    """Where its files go while it is built, what it may still embed, and the tables of all sections until written."""

    folder: Path
    pictures: Pictures = field(default_factory=Pictures)
    tables: dict[str, list[pd.DataFrame]] = field(default_factory=dict)

    def add_table(self, name: str, table: pd.DataFrame) -> None:
        """Keep `table` for tables/<name>.csv; sections of the same name are joined."""
        if not table.empty:
            self.tables.setdefault(name, []).append(table)

    def write_tables(self) -> None:
        """Write tables/*.csv."""
        for name, parts in self.tables.items():
            table = pd.concat(parts, ignore_index=True).map(harmless).rename(columns=harmless)
            text = table.to_csv(index=False, float_format="%.6g")
            write_atomically(self.folder / "tables" / f"{name}.csv", text.encode())

    def take_the_place(self, report: Path) -> None:
        """Move the whole new tables and figures to where those of an earlier report are, which go."""
        for name in ("tables", "figures"):
            if (report / name).exists():
                (report / name).rename(self.folder / f"earlier_{name}")
            if (self.folder / name).exists():
                (self.folder / name).rename(report / name)

    def figure(self, name: str, figure: Any) -> str | None:
        """Write figures/<name>.png; the inline SVG, or None for no figure."""
        return None if figure is None else figures.save_figure(figure, self.folder / "figures" / f"{name}.png")


def build_report(experiment_dirs: list[Path]) -> Path:
    """Write EXPERIMENT/report of the first folder about all of them; returns the path of index.html.

    What an earlier report left in tables/ and figures/ goes when all that is new is whole. Raises UserError for a
    folder without runs, or one whose files do not fit together, and RunsFailed with the page written where runs are
    left out because their files are damaged.
    """
    experiments = [read_experiment(Path(path)) for path in experiment_dirs]
    report = experiments[0].path / "report"
    output = Output(report / NEW)
    shutil.rmtree(output.folder, ignore_errors=True)  # of a build that was killed
    try:
        html = _page(experiments, output)
        output.take_the_place(report)
    finally:
        shutil.rmtree(output.folder, ignore_errors=True)
    path = report / "index.html"
    write_atomically(path, html.encode())
    damaged = [run for experiment in experiments for run in experiment.damaged]
    if damaged:
        raise RunsFailed(f"damaged runs are left out of the report {path}:"
                         + "".join(f"\n  {run.folder}: {run.reason}" for run in damaged))
    return path


def _page(experiments: list[Experiment], output: Output) -> str:
    """Write tables and figures; returns the page."""
    (output.folder / "tables").mkdir(parents=True)
    pages = [_experiment_context(experiment, output) for experiment in experiments]
    embed_cases([case for page in pages for section in page["sections"] for case in section["overlays"]],
                output.pictures, output.folder.parent)
    summaries = [summary for page in pages for summary in page.pop("summaries")]
    tables = _paper_tables(pd.concat(summaries, ignore_index=True), output) if summaries else []
    output.write_tables()
    titles = [page["title"] for page in pages]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "name": display_name, "labels": shots_text, "p": p_text,
                            "verdict": verdict_text}
    return environment.get_template(TEMPLATE).render(
        title=titles[0] if len(titles) == 1 else "Landmark detection: " + ", ".join(titles), experiments=pages,
        built=f"{datetime.now():%Y-%m-%d %H:%M}", pictures_left_out=output.pictures.left_out,
        tables=sorted(output.tables), paper_tables=tables, filters=page_filters(pages),
        styles=(HERE / "page.css").read_text(encoding="utf8"), script=(HERE / "page.js").read_text(encoding="utf8"))


def file_name(text: str) -> str:
    """`text`, which files may say that others made, as part of a file's name: no separators, and not too long."""
    return re.sub(r"[^\w.-]", "-", text).encode()[:NAME_BYTES].decode(errors="ignore")


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """A number for a table cell; an en dash for none."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _experiment_context(experiment: Experiment, output: Output) -> dict[str, Any]:
    config = {k: v for k, v in experiment.config.items() if k not in ("environment", "run", "$schema")}
    groups = [] if experiment.runs.empty else grouped(experiment.runs, ["dataset", "split"], sort=True)
    sections = [_section(experiment, file_name(f"{experiment.name}_{'_'.join(key)}"), runs, output)
                for key, runs in groups]
    output.add_table("unfinished", experiment.unfinished)
    best = best_run(experiment.path, {run.folder for run in (*experiment.apart, *experiment.damaged)})
    place = None if best is None else best.folder.relative_to(experiment.path).as_posix()
    if best is not None:
        output.add_table("best", pd.DataFrame([{"experiment": experiment.name, "run": place, "reason": best.reason}]))
    timesteps = config.get("ddpm", {}).get("num_train_timesteps", 500)
    curves = figures.pretraining_curves(experiment.pretraining, timesteps)
    return {
        "name": experiment.name, "title": config.get("report", {}).get("title") or experiment.name,
        "sections": sections, "summaries": [section.pop("summary") for section in sections],
        "unfinished": records(experiment.unfinished), "unscored": unscored_cases(experiment, output.pictures),
        "apart": [{"run": str(run.folder.relative_to(experiment.path)), "reason": run.reason}
                  for run in experiment.apart],
        "damaged": [{"run": str(run.folder.relative_to(experiment.path)), "reason": run.reason}
                    for run in experiment.damaged],
        "pretraining": output.figure(f"{experiment.name}_pretraining", curves),
        "encoders": output.figure(f"{experiment.name}_ssl", ssl_curves(read_ssl(experiment.path))),
        "samples": _samples(experiment.path / "ddpm" / "samples", output.pictures),
        "best": None if best is None else {"run": place, "reason": best.reason},
        "doubt": pretraining_sentence(experiment.path / "ddpm", experiment.pretraining, config),
        "config": json.dumps(config, indent=2, ensure_ascii=False),
        "environment": _flat(experiment.config.get("environment") or {}),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} · ")
        elif value is not None:
            rows.append((f"{prefix}{key}".replace("_", " "), value))
    return rows


def _samples(folder: Path, pictures: Pictures) -> list[dict[str, str]]:
    """The newest sample grid and the newest denoising strip."""
    samples = []
    for prefix, caption in (("samples", "Images drawn from noise by the pre-trained network"),
                            ("strip", "More noise from left to right, three rows an image: with the noise; what the "
                             "network makes of that in one step; how far off it is, times 4")):
        files = sorted(folder.glob(f"{prefix}_iter*.png"))
        if files:
            iteration = int(files[-1].stem.rsplit("iter", 1)[1])
            source = pictures.embed(files[-1], 1100)
            if source:
                samples.append({"source": source, "caption": f"{caption} (iteration {iteration})", "kind": prefix})
    return samples


def _section(experiment: Experiment, slug: str, runs: pd.DataFrame, output: Output) -> dict[str, Any]:
    """Everything the page says about one data set and split of an experiment."""
    every, iterations = runs, iteration_means(runs)
    iterations = iterations.assign(petaflop=[training_petaflop(row, experiment.path / "ddpm")
                                             for row in named_rows(iterations)])
    runs = every if iterations.empty else with_chosen(every, iterations)
    tried = main_family(runs, iterations)
    first, summary = runs.iloc[0], aggregate(runs)
    unit, compared, shots = first["unit"], comparisons(runs, summary), int(runs["shots"].max())
    thresholds = [float(c.rsplit("_", 1)[1]) for c in sdr_columns(runs)]
    landmarks = per_landmark(runs, shots)
    bars = landmarks.drop(columns=UNTRAINED, errors="ignore") if len(landmarks.columns) > 1 else landmarks
    identity = {"experiment": experiment.name, "dataset": first["dataset"], "split": first["split"]}
    curves, heatmaps = figures.within_curves(runs, thresholds), _heatmaps(runs, slug, output)
    sure, rounds = confidences(runs), round_rows(runs)
    cases = worst_cases(experiment, slug, runs)
    output.add_table("runs", every.drop(columns="path"))
    output.add_table("summary", summary)
    output.add_table("comparisons", compared.assign(**identity))
    output.add_table("pretraining_iterations", iterations.drop(columns="paths", errors="ignore").assign(**identity))
    output.add_table("confidence", pd.DataFrame([{**identity, **each.row, "unit": unit} for each in sure]))
    output.add_table("rounds", pd.DataFrame([{**identity, **row, "unit": unit} for row in rounds]))
    output.add_table("per_landmark", landmarks.reset_index().assign(shots=shots, unit=unit, **identity))
    return {
        **identity, "unit": unit, "images": int(first["images"]), "volumes": bool(first["volumes"]),
        "phantom": bool(first["phantom"]),
        "summary": summary, "comparisons": records(compared),
        "headline": headline(compared, unit), "sentences": sentences(compared, unit), "slug": slug,
        "rule": rule_sentence(compared), "choice": choice_sentence(tried, unit),
        "setting": f"{setting_sentence(runs)} {selection_sentence(summary)}".strip(),
        "rows": _summary_rows(summary, slug, cases),
        "sdr": sdr_columns(summary), "paper_sdr": sdr_columns(summary, "paper_"),
        "paper_left_out": next(iter(runs["scorer_left_out"].dropna()), None),
        "scorer": scorer_sentence(first["paper_rule"]) if sdr_columns(summary, "paper_") else "",
        "human": _human_row(runs), "leaks": leak_sentence(runs, summary),
        "release": release_sentence(summary if every is runs else aggregate(every)),
        "runs": records(every), "several_runs": len(every) > len(summary),
        "show_variants": bool((every.groupby("backbone")["variant"].nunique() > 1).any()),
        "confidence": _coloured([each.row for each in sure]), "rounds": _coloured(rounds),
        "landmarks": _landmark_rows(landmarks), "landmark_columns": list(landmarks.columns), "landmark_shots": shots,
        "overlays": cases, "heatmaps": heatmaps, "curves": figures.page_curves(curves, unit),
        "figures": {
            "shots": output.figure(f"{slug}_error_against_shots", figures.error_against_shots(summary, unit)),
            "bars": output.figure(f"{slug}_bars", paper_figures.error_bars(summary, unit)),
            "iterations": output.figure(f"{slug}_pretraining_iterations",
                                        paper_figures.error_against_iterations(tried, unit)),
            "cumulative": output.figure(f"{slug}_cumulative", figures.cumulative_errors(curves, unit)),
            "finetuning": output.figure(f"{slug}_finetuning", figures.finetuning_curves(runs, unit)),
            "confidence": output.figure(f"{slug}_confidence", confidence_figure(sure, unit)),
            "landmarks": output.figure(f"{slug}_landmarks", figures.landmark_bars(bars, unit, shots)),
        },
    }


def _summary_rows(summary: pd.DataFrame, slug: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aggregate, by shots and then error, the best of each number of shots marked, with what is shown of each."""
    ordered = summary.sort_values(["shots", "mre"])
    best = ordered.groupby("shots")["mre"].transform("min")
    backbones = sorted(summary["backbone"].unique())
    colours = [figures.colour(backbone, backbones) for backbone in ordered["backbone"]]
    rows = records(ordered.assign(best=ordered["mre"] == best, colour=colours, first=~ordered["shots"].duplicated()))
    return [{**row, **find_cases(row, cases), "id": f"{slug}:{row['backbone']}:{row['variant']}:{row['shots']}"}
            for row in rows]


def _coloured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the colour of their start."""
    backbones = sorted({row["backbone"] for row in rows})
    return [{**row, "colour": figures.colour(row["backbone"], backbones)} for row in rows]


def _human_row(runs: pd.DataFrame) -> dict[str, Any] | None:
    """The distance between the two annotators under the names of the summary's columns, None where there are none."""
    annotated = runs.dropna(subset=["human_mre"]) if "human_mre" in runs else runs.iloc[:0]
    if annotated.empty:
        return None
    columns = [column for column in runs.columns if column.startswith("human_")]
    return {"name": HUMAN, **{column.removeprefix("human_"): annotated[column].iloc[0] for column in columns}}


def _heatmaps(runs: pd.DataFrame, slug: str, output: Output) -> list[dict[str, Any]]:
    """Write figures/<slug>_heatmaps.png; the rows of the page's figure, those that its budget allows."""
    rows = heatmap_rows(runs)
    if rows:
        buffer = io.BytesIO()
        whole_figure(rows).save(buffer, "PNG")
        write_atomically(output.folder / "figures" / f"{slug}_heatmaps.png", buffer.getvalue())
    shown = [{**row, "source": output.pictures.embed_picture(row["picture"], HEATMAPS_WIDTH)} for row in rows]
    return [row for row in shown if row["source"]]


def _landmark_rows(landmarks: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per landmark: every backbone's error and which is the smallest; the last row is the mean."""
    rows = [(str(name), values) for name, values in landmarks.iterrows()]
    rows.append(("macro mean", landmarks.mean()))
    return [{"name": name, "values": list(values), "total": index == len(landmarks),
             "best": int(np.nanargmin(values)) if values.notna().any() else -1}
            for index, (name, values) in enumerate(rows)]


def _paper_tables(summary: pd.DataFrame, output: Output) -> list[dict[str, Any]]:
    """Write the paper's tables as CSV and LaTeX; what the page shows of each."""
    shown, published = [], published_names(summary)
    for table in paper_tables(summary):
        output.add_table(table.name, table.cells)
        write_atomically(output.folder / "tables" / f"{table.name}.tex", latex_table(table).encode())
        if table.cells["paper"].isna().all():  # of data without published figures: the files alone
            continue
        metrics, rows = wide_rows(table.cells)
        rows = [{**row, "keys": row_keys(row, published)} for row in rows]
        shown.append({"name": table.name, "title": table.title, "rows": rows, "columns": table.columns,
                      "metrics": [metric_title(metric, table.cells) for metric in metrics]})
    return shown
