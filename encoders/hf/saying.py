"""How a family's folders say an encoder: config.json and processors from options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel.published import Shape

Names = Mapping[str, tuple[str, Any]]
"""By option of ours, a field of config.json and what it is where absent."""
Rest = Mapping[str, tuple[Shape, float | tuple[float, ...]]]
"""By key, shape and value of tensors that a class has beside those of ours."""


@dataclass(frozen=True)
class Said:
    """How a family's folders say an encoder.

    config: its section of config.json. processor: preprocessor_config.json. rest: what its class has beside
    ours. stem: what published folders put before the keys of its tensors.
    """

    config: Callable[[Any], dict[str, Any]]
    processor: Callable[[Any], dict[str, Any]]
    rest: Callable[[Any], Rest] = lambda cfg: {}
    stem: str = ""


def named(cfg: Any, names: Names) -> dict[str, Any]:
    """Fields of config.json from options."""
    return {theirs: getattr(cfg, ours) for ours, (theirs, _) in names.items()}
