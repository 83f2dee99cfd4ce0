"""One config under several layout files, each with a distinct name. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config.schema import Config, load_layout_file, with_layout
from mm.errors import Refused
from mm.plan.blueprint import check_outline


@dataclass(frozen=True)
class Variant:
    """cfg: the run's config under the file at `path`. layout, schedule: as the file has them."""

    name: str
    path: Path
    cfg: Config
    layout: dict[str, Any]
    schedule: dict[str, Any]


def variants(cfg: Config, files: Sequence[Path]) -> list[Variant]:
    """The run under each layout file; raises Refused for any that does not work."""
    out = []
    for name, path in zip(distinct_names(files), files, strict=True):
        layout, schedule = load_layout_file(path)
        try:
            out.append(Variant(name, path, with_layout(cfg, layout, schedule), layout, schedule))
        except Refused as error:
            raise Refused(f"{path}: {error}") from error
    return out


def check_variants(found: Sequence[Variant], world: int) -> None:
    """Check each on `world` ranks, all but its encoders; raises Refused naming the file."""
    for variant in found:
        try:
            check_outline(variant.cfg, world)
        except Refused as error:
            raise Refused(f"{variant.path}: {error}") from error


def distinct_names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem; with its folder where two have one stem; with a number where a file is
    given twice."""
    stems = Counter(path.stem for path in files)
    names = [p.stem if stems[p.stem] == 1 else str(p.with_suffix("")) for p in files]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
