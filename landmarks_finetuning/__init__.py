"""Landmark detectors: trained, scored, and used. `Detector` is for Python programs; importing it brings in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from landmarks_finetuning.detector import Detector, Landmarks

__all__ = ["Detector", "Landmarks"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when it is first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from landmarks_finetuning import detector

    return getattr(detector, name)
