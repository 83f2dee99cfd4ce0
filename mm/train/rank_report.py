"""What each rank reports at the end of a step, as one row of numbers for the control message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

Reduce = Callable[[Sequence[float]], float]
Name = TypeVar("Name")


class Scalars(NamedTuple):
    """What a rank reports once."""

    loss: float  # sum of this rank's token losses over the step's supervised tokens; ranks' losses add up
    sync_s: float  # seconds spent summing gradients
    memory_bytes: float  # peak
    stop: float  # 1 where this rank was asked to end, else 0


class ModuleReport(NamedTuple):
    """What a rank reports of one module."""

    squares: float  # sum of its gradients' squares; ranks' sums add up
    compute_s: float  # host seconds of its forwards and backwards


class EdgeReport(NamedTuple):
    """What a rank reports of the boundary of one encoder, both directions together."""

    received_bytes: float  # payload from other ranks
    seconds: float


@dataclass(frozen=True)
class Report:
    """One rank's report of a step. All ranks have equal names in equal order.

    modules, edges: by module and by encoder. objectives: by objective, sums over this rank's tokens. They are
    separate fields, so that no module's name is taken for another kind of name.
    """

    scalars: Scalars
    modules: Mapping[str, ModuleReport]
    edges: Mapping[str, EdgeReport]
    objectives: Mapping[str, float]

    def numbers(self) -> list[float]:
        """The report as a row: scalars, then modules, edges and objectives in their order."""
        return [
            *self.scalars,
            *chain.from_iterable(self.modules.values()),
            *chain.from_iterable(self.edges.values()),
            *self.objectives.values(),
        ]

    def read(self, row: Sequence[float]) -> Report:
        """Another rank's report from its row; names are those of this report."""
        numbers = iter(map(float, row))
        return Report(
            scalars=Scalars(
                loss=next(numbers), sync_s=next(numbers), memory_bytes=next(numbers), stop=next(numbers)
            ),
            modules={m: ModuleReport(squares=next(numbers), compute_s=next(numbers)) for m in self.modules},
            edges={m: EdgeReport(received_bytes=next(numbers), seconds=next(numbers)) for m in self.edges},
            objectives={name: next(numbers) for name in self.objectives},
        )


def over_ranks(reduce: Reduce, rows: Sequence[Mapping[Name, float]]) -> dict[Name, float]:
    """By name, `reduce` (sum, max) of all ranks' values."""
    return {name: reduce([row[name] for row in rows]) for name in rows[0]}
