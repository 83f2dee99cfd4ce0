"""What each rank says at the end of a step, as one row of numbers, and what all of them together mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Reduce = Callable[[Sequence[float]], float]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Report:
    """One rank's share of a step. Mappings are by module, by encoder (edge) or by objective, so that no name
    of one kind is taken for one of another; all ranks have equal keys in equal order.

    loss: its part of the mean; sync_s: seconds of the gradients' sums; memory_bytes: peak; stop: 1 where it
    was signalled to end. squares: of its gradients, by module; compute_s: by module; edge_bytes, edge_s: by
    encoder; objectives: sums over its tokens.
    """

    loss: float
    sync_s: float
    memory_bytes: float
    stop: float
    squares: Mapping[str, float]
    compute_s: Mapping[str, float]
    edge_bytes: Mapping[str, float]
    edge_s: Mapping[str, float]
    objectives: Mapping[str, float]

    def numbers(self) -> list[float]:
        """All of it in a row."""
        out: list[float] = []
        for f in fields(self):
            value = getattr(self, f.name)
            out += value.values() if isinstance(value, Mapping) else [value]
        return out

    def read(self, row: Sequence[float]) -> Report:
        """Another rank's report from its row: the names are those of this one."""
        numbers = iter(map(float, row))
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Mapping):
                found[f.name] = {name: next(numbers) for name in value}
            else:
                found[f.name] = next(numbers)
        return Report(**found)


def over_ranks(reduce: Reduce, rows: Sequence[Mapping[Name, float]]) -> dict[Name, float]:
    """By name, what `reduce` (sum, max) makes of all ranks' values."""
    return {name: reduce([row[name] for row in rows]) for name in rows[0]}
