"""Which samples a step takes: a pure function of (config, index, step, known-bad samples)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mm.config.schema import Config
from mm.data.sample import Index
from mm.order.stream import Stream
from mm.plan.inputs import PlanInputs
from mm.plan.step_plan import StepPlan, plan_table
from mm.plan.table import SampleTable
from parallel.sequence.intervals import Column

Lookup = Callable[[Column], SampleTable]  # SampleTable.take() of a table whose lines are all samples


@dataclass(frozen=True)
class Batches:
    """The batches of a run. size: samples a step."""

    stream: Stream
    size: int

    @staticmethod
    def of(cfg: Config, index: Index) -> Batches:
        """Those of a run that trains on this index."""
        return Batches(Stream.whole(cfg.run.seed, len(index.samples)), cfg.train.global_batch)

    def ids(self, step: int, bad: Collection[int] = ()) -> Column:
        """The samples of a step, which counts from 0. bad: samples known to be unreadable or left out.

        Raises DataError where a sample can be replaced by no other.
        """
        positions = step * self.size + np.arange(self.size)
        ids, source = self.stream.at(positions)
        return self.stream.mended(positions, ids, source, _ascending(frozenset(bad)))

    def plan(self, step: int, lookup: Lookup, inputs: PlanInputs, bad: Collection[int] = ()) -> StepPlan:
        """The plan of a step; as ids()."""
        return plan_table(step, lookup(self.ids(step, bad)), inputs)


@lru_cache(maxsize=2)
def _ascending(ids: frozenset[int]) -> Column:
    """Sorted once, however many steps are planned with them."""
    return np.sort(np.fromiter(ids, dtype=np.int64, count=len(ids)))


def first_plan(cfg: Config, inputs: PlanInputs, index: Index) -> StepPlan:
    """The plan of step 0; looks at its own samples alone."""

    def lookup(ids: Column) -> SampleTable:
        return SampleTable.of([index.samples[i] for i in ids.tolist()], inputs)

    return Batches.of(cfg, index).plan(0, lookup, inputs, index.skipped.keys())
