"""What each rank reports at the end of a step, as one row of numbers for the control message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from mm.plan.subsets import Subset

N = TypeVar("N")
"""A number (float, or a scalar on the device) of one rank, or a column [ranks] of those of all ranks."""

Own = float | Tensor


class Scalars(NamedTuple, Generic[N]):
    """What a rank reports once."""

    sync_s: N  # seconds spent summing gradients
    memory_bytes: N  # peak
    stop: N  # 1 where this rank was asked to end, else 0


class ModuleReport(NamedTuple, Generic[N]):
    """What a rank reports of one module."""

    squares: N  # sum of its gradients' squares; ranks' sums add up
    compute_s: N  # host seconds of its forwards and backwards
    waited_s: N  # of those, seconds until inputs had come from other ranks


class EdgeReport(NamedTuple, Generic[N]):
    """What a rank reports of the boundary of one encoder, both directions together."""

    received_bytes: N  # payload from other ranks
    seconds: N


class LayerReport(NamedTuple, Generic[N]):
    """What a rank reports of one layer, in steps that statistics are asked of. Ranks' sums add up."""

    grad_squares: N  # sum of its gradients' squares
    grad_max: N  # largest absolute element of its gradients
    elements: N  # of its outputs, how many
    total: N  # their sum
    squares: N  # sum of their squares
    largest: N  # largest absolute one


@dataclass(frozen=True)
class Report(Generic[N]):
    """One rank's report of a step, or the columns of all ranks' reports. All have equal names in equal order.

    losses: by subset of the samples, sums of this rank's token losses over the step's supervised tokens;
        ranks' losses add up.
    modules, edges: by module and by encoder.
    objectives: by objective, sums over this rank's tokens.
    layers: by module and place (mm.plan.places), in steps that statistics are asked of; else empty.
    They are separate fields, so that no module's name is taken for another kind of name.
    """

    scalars: Scalars[N]
    losses: Mapping[Subset, N]
    modules: Mapping[str, ModuleReport[N]]
    edges: Mapping[str, EdgeReport[N]]
    objectives: Mapping[str, N]
    layers: Mapping[tuple[str, str], LayerReport[N]] = field(default_factory=dict)

    def numbers(self) -> list[N]:
        """The report as a row: scalars, then losses, modules, edges, objectives and layers in their order."""
        return [
            *self.scalars,
            *self.losses.values(),
            *chain.from_iterable(self.modules.values()),
            *chain.from_iterable(self.edges.values()),
            *self.objectives.values(),
            *chain.from_iterable(self.layers.values()),
        ]

    def read(self, table: np.ndarray) -> Report[np.ndarray]:
        """All ranks' reports from their rows [ranks, numbers], by column; names are those of this report."""
        columns: Iterator[np.ndarray] = iter(table.T)
        return Report(
            scalars=Scalars(*(next(columns) for _ in Scalars._fields)),
            losses={name: next(columns) for name in self.losses},
            modules={m: ModuleReport(*(next(columns) for _ in ModuleReport._fields)) for m in self.modules},
            edges={m: EdgeReport(received_bytes=next(columns), seconds=next(columns)) for m in self.edges},
            objectives={name: next(columns) for name in self.objectives},
            layers={name: LayerReport(*(next(columns) for _ in LayerReport._fields)) for name in self.layers},
        )
