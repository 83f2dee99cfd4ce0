"""Plans that are made once and reused while the row maps stay equal."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial

from parallel.boundary.plan import EdgePlan, plan_edge
from parallel.boundary.rows import RowMap
from parallel.boundary.stack import Stack, plan_stack


class PlanCache:
    """plan_edge() for one rank, which remembers its last `keep` plans.

    Batches of pictures of one size have equal row maps, and so have the micro-batches of a repeated
    evaluation. A remembered plan costs a hash of both maps. Not to be shared between threads.

    rank: the global rank to plan for. node_size, spares: of plan_edge(). keep: plans remembered, over all
    edges.
    """

    def __init__(
        self, rank: int, *, node_size: int | None = None, spares: float = 0.0, keep: int = 64
    ) -> None:
        self.rank, self.keep = rank, keep
        self._plan = partial(plan_edge, rank=rank, node_size=node_size, spares=spares)
        self._plan_stack = partial(plan_stack, rank=rank, node_size=node_size, spares=spares)
        self._plans: OrderedDict[Hashable, EdgePlan] = OrderedDict()

    def plan(
        self, name: str, source: RowMap, dest: RowMap, *, row_shape: tuple[int, ...] | None = None
    ) -> EdgePlan:
        """The plan of edge `name`; a remembered one is the same object. Raises as plan_edge() does."""
        key = (name, row_shape, source.lanes, dest.lanes, _digest(source), _digest(dest))
        found = self._plans.pop(key, None)
        if found is None:
            found = self._plan(name, source, dest, row_shape=row_shape)
        self._plans[key] = found  # now the most recently used
        while len(self._plans) > self.keep:
            self._plans.popitem(last=False)
        return found

    def plan_stack(
        self, name: str, stack: Stack, *, row_shape: tuple[int, ...] | None = None
    ) -> tuple[EdgePlan, ...]:
        """plan_stack() for this rank; not remembered, as the batches of a training run differ."""
        return self._plan_stack(name, stack, row_shape=row_shape)


def _digest(m: RowMap) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    for column in (m.start, m.length, m.lane, m.local, m.rows, *(m.copies or ())):
        h.update(len(column).to_bytes(8, "little"))
        h.update(column.tobytes())
    return h.digest()
