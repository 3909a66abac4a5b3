"""The page of a check: its text, and every image of an alarm with the landmarks that it has."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment
from PIL import Image, ImageDraw

from core.config.config import Config
from core.data.cache import load_one
from core.data.records import DataSource, Record
from core.data.resize import normalise
from core.errors import UserError
from core.files import write_atomically
from core.formats.geometry import apply_maps
from study.check.overview import Overview

SIDE = 256  # pixels of a picture on the page
MOST_PICTURES = 200  # a page stays below a few MB
SHOWN_LABELS = 12  # labelled images that are shown where nothing is wrong with them
PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Check of {{ name }}</title>
<style>
td:first-child { white-space: nowrap }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222 }
table { border-collapse: collapse } td { padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: anywhere }
section { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0 }
section div { flex: 1 1 16rem; overflow-wrap: anywhere } img { max-width: 100%; background: #000 }
figure { margin: 0 }
</style>
<h1>Check of {{ name }}</h1>
<table>{% for what, how in facts %}<tr><td><b>{{ what }}</b><td>{{ how }}{% endfor %}</table>
<h2>{{ alarms|length or "Nothing" }} to look at</h2>
{% if alarms %}<p>Each line is a guess from the other images: look, then correct the file, or leave it as it is.
Landmarks in red;
the first one is larger.</p>{% endif %}
{% for alarm, pictures in alarms %}<section><div><b>{{ alarm.kind }}</b><br>{{ alarm.text }}</div>
{% for name, data in pictures %}<figure><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</section>
{% endfor %}
{% if labels %}<h2>The labels</h2>
<p>The first {{ labels|length }} labelled images, as they were read. What is wrong in most images raises no alarm: it is
seen here.
{% for name in names %}{{ loop.index }} {{ name }}{{ ", " if not loop.last else "." }}{% endfor %}</p>
<section>{% for name, data in labels %}<figure><img alt="{{ name }}, labelled" src="data:image/png;base64,{{ data }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}</section>{% endif %}
</html>
""")


def write_page(path: Path, config: Config, source: DataSource, found: Overview) -> Path:
    """Write the page, which stands for itself; returns its path."""
    records = {record.id: record for record in source.records}
    left, shown = MOST_PICTURES, []
    for alarm in found.alarms:
        pictures = [(name, picture(records[name], config)) for name in alarm.images[: max(0, left)]]
        left -= len(pictures)
        shown.append((alarm, [(name, data) for name, data in pictures if data is not None]))
    seen = [(record.id, picture(record, config)) for record in source.labelled[:SHOWN_LABELS]]
    labels = [(name, data) for name, data in seen if data is not None]
    cost = [tuple(line.split("  ", 1)) for line in found.cost.lines()] if found.cost else []
    text = PAGE.render(name=config.dataset.name, facts=[*found.facts, *cost], alarms=shown,
                       labels=labels, names=source.landmark_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def picture(record: Record, config: Config) -> str | None:
    """A PNG in base64 of an image, of a volume its middle slice, with its landmarks; None where it cannot be read."""
    try:
        loaded = load_one(record, config.dataset)
    except UserError:
        return None
    pixels = normalise(loaded.pixels, config.dataset)[0]
    points = np.zeros((0, pixels.ndim)) if record.landmarks is None else apply_maps(record.truth[None],
                                                                                    loaded.map[None])[0]
    while pixels.ndim > 2:
        pixels = pixels[len(pixels) // 2]
    grey = Image.fromarray(np.clip(np.asarray(pixels) * 255, 0, 255).astype(np.uint8))
    scale = SIDE / max(grey.size)
    drawn = grey.resize((round(grey.width * scale), round(grey.height * scale))).convert("RGB")
    _draw(drawn, points[:, -2:], scale)
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _draw(drawn: Image.Image, points: Sequence[Sequence[float]] | np.ndarray, scale: float) -> None:
    """Landmarks (N, 2), y, x, as dots with their numbers from 1."""
    pen = ImageDraw.Draw(drawn)
    for number, (y, x) in enumerate(points):
        if np.isfinite(y + x):
            radius = 4 if number == 0 else 2
            pen.ellipse([x * scale - radius, y * scale - radius, x * scale + radius, y * scale + radius], fill="red")
            pen.text((x * scale + 5, y * scale - 5), str(number + 1), fill="yellow", stroke_width=1,
                     stroke_fill="black")
