"""What the models of the config are built from: the section itself, its settings, common types, clipping, augmentation.

A setting is a key of the config file. `setting` says all there is to say about it: its default and meaning, which runs
it counts for, which backbones it concerns, how it stands in a variant's name and where it acts. What a setting does
not say itself, the section says in which it stands. core.config.settings reads all this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Run = Literal["pretraining", "ssl", "training", "scoring"]
NAME_BYTES = 90  # of the name of a study, and of a data set
FREE: tuple[Run, ...] = ()


class Condition(NamedTuple):
    """A setting acts only where another one has, or has not, one of `values`; text may hold * for anything."""

    key: str  # of the same section, or of the whole file; "a and b": it is all of them that have one
    values: tuple[Any, ...]
    allowed: bool
    advice: str = ""  # what to do, where that is not to change `key`


def only(key: str, *values: Any) -> Condition:
    """The setting acts only where `key` has one of `values`."""
    return Condition(key, values, True)


def unless(key: str, *values: Any, advice: str = "") -> Condition:
    """The setting does not act where `key` has one of `values`."""
    return Condition(key, values, False, advice)


def setting(default: Any, description: str, *, counts_for: Sequence[Run] | None = None,
            backbones: Sequence[str] | None = None, slug: str | None = None, null_slug: str | None = None,
            is_file: bool | None = None, before: Any = None, acts: Sequence[Condition] = (),
            may_wait: bool | None = None, **limits: Any) -> Any:
    """A setting, or a section with what holds for all its settings.

    counts_for: a run of these kinds made with another value is another run; FREE = it never matters.
    backbones: the starts it concerns; None = all, the mean shape among them.
    slug: its name within a variant's name; null_slug stands there for null, is_file shortens a path
    (core.runs.places.file_slug).
    before: what runs did whose config.json is older than the setting.
    acts: where it acts, all of them; elsewhere giving it another value than the default is an error.
    may_wait: it may be given though no start that it concerns is compared.
    `limits` are pydantic's: gt, ge, lt, le, pattern, min_length and so on.
    """
    said = {"counts_for": counts_for, "backbones": backbones, "slug": slug, "null_slug": null_slug, "is_file": is_file,
            "before": before, "acts": acts or None, "may_wait": may_wait}
    extra: dict[str, Any] = {"setting": {name: value for name, value in said.items() if value is not None}}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """A part of the config: frozen, and refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def folder_name(key: str, name: str) -> str:
    """`name`, the value of `key`; ValueError where it is no name of a folder, or too long beside what is added to it.

    The report joins the names of study and data set, and file systems allow 255 bytes.
    """
    if name in (".", ".."):
        raise ValueError(f'{key} "{name}" is no name but a place; choose letters and digits')
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"{key} has {len(name.encode())} bytes, and files are called after it: at most {NAME_BYTES}")
    return name


def with_default(section: type[Section], name: str, default: Any) -> Any:
    """The setting `name` of `section` with another default, for a section that inherits from it."""
    field = section.model_fields[name]
    return Field(default, description=field.description, json_schema_extra=field.json_schema_extra)


class Clip(Section):
    """Gradient clipping."""

    mode: Literal["none", "value", "norm"] = setting(
        "none", "none: off; value: entries of the gradient are cut at the limit; norm: all are scaled down to it")
    limit: Rate = setting(1.0, "largest entry, or largest norm, of the gradient", acts=[unless("mode", "none")])


class NormClip(Clip):
    """Gradient clipping, by norm unless another mode is given: giving the limit alone leaves it on."""

    mode: Literal["none", "value", "norm"] = with_default(Clip, "mode", "norm")


class Augmentation(Section):
    """Random movement of image and landmarks together, and changes of intensity."""

    probability: Share = setting(0.5, "share of the images that are moved")
    rotation_degrees: Degrees | tuple[Degrees, Degrees, Degrees] = setting(
        2.0, "largest angle, either way; of volumes about each axis, or three: about x, y and z",
        acts=[unless("probability", 0)])
    scale: Fraction = setting(0.02, "factor drawn from 1 +- scale", acts=[unless("probability", 0)])
    translation: Fraction = setting(0.02, "largest shift as a fraction of the size, along each axis",
                                    acts=[unless("probability", 0)])
    intensity: Fraction = setting(0.0, "strength of random brightness, contrast and gamma, of every image; 0 = off")
    elastic: float = setting(
        0.0, "largest smooth random displacement as a fraction of the size, along each axis, less where it would fold; "
        "of the images that probability says; 0 = off", ge=0, le=0.1, before=0.0, acts=[unless("probability", 0)])
    artefacts: Share = setting(0.0, "share of the images with uneven exposure, with a dark border, and with a bright "
                               "marker, each drawn by itself; 0 = off", before=0.0)
