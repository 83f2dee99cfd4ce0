"""When the sink's pipeline computes if it runs alone, and so when source work is inserted into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from parallel.schedule.action import BACKWARD_WEIGHT, COMPUTE, FORWARD
from parallel.schedule.generators.lower import lower
from parallel.schedule.generators.orders import Work
from parallel.schedule.generators.problem import Problem
from parallel.schedule.generators.sources import FirstStageOrder, Grouping, MicrobatchGroup, Slot
from parallel.schedule.plan import Place
from parallel.schedule.simulator.simulate import simulate


@dataclass(frozen=True)
class Times:
    """Simulated times, in seconds, of the sink's works without any source.

    starts: by pipeline rank, when each of its works starts.
    finish: by micro-batch, when its backward at the first stage ends; absent where it has none.
    """

    starts: Sequence[Sequence[float]]
    finish: Mapping[int, float]

    @staticmethod
    def of(problem: Problem, works: Sequence[Sequence[Work]]) -> Times:
        """Simulate the sink's works, given by pipeline rank."""
        sink = problem.sink
        alone = replace(
            problem,
            modules={sink: problem.modules[sink]},
            active=(frozenset[str](),) * len(problem.active),
            options=replace(problem.options, optimizer=False),
        )
        lists: dict[Place, Sequence[Work]] = {(r,): w for r, w in enumerate(works)}
        line = simulate(lower(alone, lists), problem.options.costs)
        starts: list[list[float]] = [[] for _ in works]
        finish: dict[int, float] = {}
        for p, actions in enumerate(line.plan.programs):
            r = line.plan.places[p][0]
            assert r is not None
            for a, start, end in zip(actions, line.start[p], line.end[p], strict=True):
                if a.kind not in COMPUTE:
                    continue
                starts[r].append(start)
                if a.stage == 0 and a.kind not in (FORWARD, BACKWARD_WEIGHT):
                    finish[a.microbatch] = end
        return Times(starts, finish)

    def returns(self, group: MicrobatchGroup) -> list[int]:
        """The micro-batches of a group whose gradients come back."""
        return [i for i in range(group.start, group.stop) if i in self.finish]

    def insertion(
        self, group: MicrobatchGroup, order: FirstStageOrder, grouping: Grouping
    ) -> tuple[Slot, float]:
        """Where a group's work is inserted: in the order of the sink's first stage, and the simulated second
        of it, which is the same on every rank."""
        lead, slack, starts = grouping.lead, grouping.slack, self.starts[0]
        if not group.backward:
            at = order.forward_index(group.start, lead, slack)
            return order.forward_slot(group.start, lead, slack), starts[at]
        last = self.returns(group)[-1]
        slot, at = order.backward_slot(last, slack), order.backward_index(last, slack)
        if not slack:
            return slot, self.finish[last]
        return slot, starts[at] if at < len(starts) else math.inf
