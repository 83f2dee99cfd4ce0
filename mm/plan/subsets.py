"""The subsets of a step that metrics have a loss of: samples of equal modalities and of one data set.

Which samples are in a subset, and how many supervised tokens it has, follows from the plan. Ranks exchange
only sums of losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mm.plan.table import SampleTable
from parallel.sequence.intervals import Column, sums

TEXT = "text"  # the modality of samples without items


class Subset(NamedTuple):
    """modality: modules whose items the samples have, joined by "+", or "text". source: of their data set."""

    modality: str
    source: str


class SubsetLoss(NamedTuple):
    """loss: nats a supervised token. tokens: supervised ones."""

    loss: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Subsets:
    """The subsets of one step that have samples.

    names: in order of modality and then of source. of: by line of the step's table, the index of its subset.
    tokens: by subset, supervised tokens.
    """

    names: tuple[Subset, ...]
    of: Column
    tokens: Column

    @staticmethod
    def of_table(table: SampleTable) -> Subsets:
        """The subsets of the samples of a table, O(n log n)."""
        n = len(table.sources)
        which = sum((items.of > 0).astype(np.int64) << k for k, items in enumerate(table.items.values()))
        keys, of = np.unique(which * n + table.source, return_inverse=True)
        found = tuple(Subset(_modality(k // n, table), table.sources[k % n]) for k in keys.tolist())
        of = of.astype(np.int64)
        return Subsets(found, of, sums(table.supervised, of, len(found)))

    @cached_property
    def _supervised(self) -> int:
        return int(self.tokens.sum())

    def losses(self, shares: Mapping[Subset, float], field: str) -> dict[str, SubsetLoss]:
        """The loss by modality or by source, where there are supervised tokens. shares: by subset, sums of
        token losses over the supervised tokens of the whole step. field: of Subset."""
        nats: dict[str, float] = {}
        tokens: dict[str, int] = {}
        for subset, count in zip(self.names, self.tokens.tolist(), strict=True):
            name = getattr(subset, field)
            nats[name] = nats.get(name, 0.0) + shares[subset] * self._supervised
            tokens[name] = tokens.get(name, 0) + count
        return {name: SubsetLoss(nats[name] / n, n) for name, n in tokens.items() if n}


def _modality(bits: int, table: SampleTable) -> str:
    return "+".join(m for k, m in enumerate(table.items) if bits >> k & 1) or TEXT
