"""Every setting of the config file with what its metadata says: what it counts for, and for which backbones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, get_args, get_origin

from core.config.config import Config
from core.config.section import FREE, Condition, Run, Section


@dataclass(frozen=True)
class Setting:
    """One key of the config file; see core.config.section.setting for what the fields mean."""

    key: str  # section.key
    description: str
    default: Any
    type: Any
    limits: tuple[Any, ...]  # pydantic's, of the whole value
    counts_for: tuple[Run, ...] = FREE
    backbones: tuple[str, ...] | None = None
    slug: str | None = None
    null_slug: str | None = None
    is_file: bool = False
    before: Any = None
    acts: tuple[Condition, ...] = ()
    may_wait: bool = False

    @property
    def role(self) -> str:
        """identity: another value makes another run; scoring: another score of the same run; free: neither."""
        return "free" if not self.counts_for else "scoring" if self.counts_for == ("scoring",) else "identity"

    def concerns(self, backbone: str) -> bool:
        """Whether runs that start from `backbone` can depend on it."""
        return self.backbones is None or backbone in self.backbones

    def of(self, config: Config) -> Any:
        """Its value in `config`."""
        return reduce(getattr, self.key.split("."), config)


INHERITED = ("counts_for", "backbones", "slug", "null_slug", "is_file", "acts", "may_wait")


@lru_cache
def all_settings() -> dict[str, Setting]:
    """{key: setting} of the whole file, in its order; a section within a section is spelled out."""
    return {each.key: each for each in _walk(Config, Config(), "", {})}


def counting_for(run: Run, backbone: str) -> frozenset[str]:
    """The keys that make another run, or score, of this kind where they have another value."""
    return frozenset(key for key, each in all_settings().items() if run in each.counts_for and each.concerns(backbone))


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field's type is, or that it is where it is not null."""
    if get_origin(annotation) is tuple:
        return None
    parts = (each for each in (annotation, *get_args(annotation)) if get_origin(each) is None)
    return next((each for each in parts if isinstance(each, type) and issubclass(each, Section)), None)


def _walk(model: type[Section], defaults: Section | None, prefix: str, inherited: dict[str, Any]) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        content = extra["setting"] if isinstance(extra, dict) else None
        said: dict[str, Any] = content if isinstance(content, dict) else {}
        own = inherited | said | {"acts": (*inherited.get("acts", ()), *_absolute(said.get("acts", ()), model, prefix))}
        default = field.default if defaults is None else getattr(defaults, name)
        key, section = prefix + (field.alias or name), section_of(field.annotation)
        if section is not None:
            yield from _walk(section, default, f"{key}.", {each: own[each] for each in INHERITED if each in own})
        else:
            yield Setting(key, field.description or "", default, field.annotation, tuple(field.metadata), **own)


def _absolute(conditions: Sequence[Condition], model: type[Section], prefix: str) -> Iterator[Condition]:
    """The conditions with whole keys: one of the same section is named there without it."""
    return (each._replace(key=prefix + each.key) if each.key in model.model_fields else each for each in conditions)
