"""What the models of the config are built from: the section itself, common types, clipping and augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: frozen, and refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Clip(Section):
    """Gradient clipping."""

    mode: Literal["none", "value", "norm"] = "none"
    limit: float = Field(1.0, gt=0)


class NormClip(Clip):
    """Gradient clipping, by norm unless told otherwise: giving the limit alone leaves it on."""

    mode: Literal["none", "value", "norm"] = "norm"


class Augmentation(Section):
    """Random similarity applied to image and landmarks together, and intensity changes."""

    probability: float = Field(0.5, ge=0, le=1)
    rotation_degrees: Degrees | tuple[Degrees, Degrees, Degrees] = Field(
        2.0, description="largest angle, either way; of volumes about each axis, or three: about x, y and z")
    scale: float = Field(0.02, ge=0, lt=1, description="factor drawn from 1 +- scale")
    translation: float = Field(0.02, ge=0, lt=1, description="fraction of the size, each axis")
    intensity: float = Field(0.0, ge=0, lt=1, description="strength of random brightness, contrast and gamma; 0 = off")
