"""The facts of a data set, its alarms, and what a study of it costs, as one short text."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from core.config.config import Config
from core.data.records import DataSource, Record
from study.check.cost import Cost
from study.check.findings import Alarm, some
from study.check.labels import Labelled, label_alarms
from study.check.pixels import (
    MOST,
    Picture,
    drift_alarms,
    exchange_alarms,
    picture_alarms,
    read_pictures,
    size_alarms,
    twin_alarms,
)

SHOWN = 8  # alarms in the short text


class Overview(NamedTuple):
    """All that was seen: (what, how it is) facts, alarms, pictures looked at, labels if any, cost if asked for."""

    facts: list[tuple[str, str]]
    alarms: list[Alarm]
    pictures: list[Picture]
    cost: Cost | None

    def lines(self, shown: int | None = SHOWN) -> list[str]:
        """The short text: facts, cost, alarms; None: all of them."""
        lines = [f"{what}  {how}" for what, how in self.facts] + (self.cost.lines() if self.cost else [])
        if not self.alarms:
            return [*lines, "look at  nothing: no alarm"]
        counts = Counter(alarm.kind for alarm in self.alarms)
        lines.append(f"look at  {len(self.alarms)}: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
        lines += [f"    {alarm}" for alarm in self.alarms[:shown]]
        rest = len(self.alarms) - (shown or len(self.alarms))
        return lines + ([f"    and {rest} more on the page"] if rest > 0 else [])


def overview(config: Config, source: DataSource, cost: Cost | None = None) -> Overview:
    """Read the data set's images through the cache and look at everything. Nothing of it is refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of landmarks that nobody has
        pictures, alarms = read_pictures(source.records, config.dataset)
        unread = {name for alarm in alarms for name in alarm.images}
        if source.labelled:
            labels = Labelled.of(source.labelled, source.landmark_names, config.dataset)
            alarms += label_alarms(labels)
        alarms += size_alarms(source.records) + picture_alarms(pictures)
        if source.labelled:
            named = unread | {name for alarm in alarms for name in alarm.images}
            rest = [record for record in source.labelled if record.id not in named][:MOST]
            if rest:
                labels = Labelled.of(rest, source.landmark_names, config.dataset)
                alarms += exchange_alarms(labels, config.dataset)
        alarms += twin_alarms(pictures) + drift_alarms(source, pictures)
    return Overview(facts_of(config, source, pictures), alarms, pictures, cost)


def facts_of(config: Config, source: DataSource, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Counts, sizes, spacings, grey values, labels, unit."""
    counts = ", ".join(f"{len(records)} {split}" for split, records in source.splits.items())
    facts = [("data", f"{config.dataset.name} ({source.layout}) at {source.root}: {counts}, "
              f"{len(source.unlabelled)} unlabelled"),
             ("sizes", _sizes(source.records)), ("spacings", _spacings(source))]
    if pictures:
        lows, highs = ([getattr(picture, end) for picture in pictures] for end in ("low", "high"))
        means = [picture.mean for picture in pictures]
        facts.append(("grey", f"darkest {min(lows):.4g} to {max(lows):.4g}, brightest {min(highs):.4g} to "
                      f"{max(highs):.4g}, means {min(means):.4g} to {max(means):.4g}; dataset.intensity is "
                      f"{config.dataset.intensity}" + (f" ({len(pictures)} images looked at)"
                                                        if len(pictures) < len(source.records) else "")))
    if source.labelled:
        missing = np.isnan(np.stack([record.truth for record in source.labelled])).any(axis=2).sum(axis=0)
        lacking = [f"{name} {count}" for name, count in zip(source.landmark_names, missing.tolist(), strict=True)
                   if count]
        facts.append(("labels", f"{len(source.landmark_names)} landmarks in {len(source.labelled)} images; missing: "
                      f"{some(lacking, 6) or 'none'}"))
    else:
        facts.append(("labels", "none: no landmarks.csv, or other file of this layout, has landmarks "
                      "(datasets/README.md says where they lie)"))
    unit = source.unit
    if unit == "px" and all(record.spacing is None for record in source.records):
        unit = "px of the stored images: no spacing is known, so none in mm"
    facts.append(("errors", f"in {unit}" if source.labelled else "none: there are no labels"))
    return facts


def _sizes(records: Sequence[Record]) -> str:
    """The most frequent sizes; those of unlabelled pictures are not known before they are read."""
    sizes = Counter(" x ".join(map(str, record.geometry.size[::-1])) for record in records
                    if record.geometry is not None)
    listed = [f"{size} ({count})" for size, count in sizes.most_common()]
    return some(listed) or "not read yet"


def _spacings(source: DataSource) -> str:
    spacings = Counter(" x ".join(f"{value:.4g}" for value in record.spacing[::-1]) for record in source.records
                       if record.spacing is not None)
    return f"{some(f'{spacing} ({count})' for spacing, count in spacings.most_common())} {source.unit} a pixel" \
        if spacings else "none given"
