"""The load of a step: its documents and items, and what the data rank with most of them has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.inputs import PlanInputs
from mm.plan.step_plan import StepPlan
from mm.predict.count.load import token_load
from mm.predict.count.packed import windowed
from mm.predict.count.sizes import Attended, Bucket, TokenLoad
from parallel.topology.layout import Coord, make_layout

Meta = Mapping[str, Any]


class Corner(NamedTuple):
    """Documents at an extreme of a step's: tokens of one, and of these with a loss, of the next token and of
    each depth of multi-token prediction. cost: FLOPs of one, as documents are dealt by."""

    length: int
    supervised: tuple[float, ...]
    cost: float


@dataclass(frozen=True)
class Dealt:
    """What the data rank of the language model with most work has. costs: of its documents by micro-batch.
    plan: of the step, most: that rank, whose loads follow.

    tokens: of the rank with most, of the mean micro-batch; light: of the rank with least; thin: of the
    micro-batch and rank with least. even: cost of the mean data rank over that of this one. share: over the
    micro-batches, the mean of that.
    """

    costs: tuple[float, ...]
    plan: StepPlan = field(repr=False, compare=False)
    most: int
    tokens: float
    light: float
    thin: float
    even: float
    share: float

    def loads(self, blueprint: Blueprint) -> tuple[TokenLoad, ...]:
        """What its first rank computes in each micro-batch: asked for last, as it takes the most time."""
        at, item = Coord(0, 0, self.most, 0), blueprint.dtype.itemsize
        return tuple(token_load(mb, at, blueprint.llm, item) for mb in self.plan.microbatches)


@dataclass(frozen=True)
class StepLoad:
    """inputs: of a plan, and planned: the step's plan from inputs, whose microbatches and layout of the
    language model change. item: bytes of an element. items: by encoder, metadata of each.

    alike: whether each sample is as long as any other and has the same items.
    """

    blueprint: Blueprint
    plan: StepPlan
    planned: Callable[[PlanInputs], StepPlan]
    items: Mapping[str, tuple[Meta, ...]]
    alike: bool
    _known: dict[object, Dealt] = field(default_factory=dict, compare=False)
    _shares: dict[int, float] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(blueprint: Blueprint, planned: Callable[[PlanInputs], StepPlan]) -> StepLoad:
        """The load of a step of a job, whatever its layout."""
        plan = planned(blueprint.inputs)
        table = plan.table
        items: dict[str, list[Meta]] = {m: [] for m in blueprint.inputs.encoders}
        kinds = set()
        for j in table.which.tolist():
            found = []
            for segment in table.samples[j].segments:
                if segment.part is not None and segment.kind in items:
                    items[segment.kind].append(segment.part.meta)
                    found.append((segment.kind, str(dict(segment.part.meta))))
            kinds.add(tuple(sorted(found)))
        return StepLoad(
            blueprint,
            plan,
            planned,
            items={m: tuple(found) for m, found in items.items()},
            alike=bool(table.length.min() == table.length.max()) and len(kinds) == 1,
        )

    @property
    def documents(self) -> int:
        """Samples of the step."""
        return len(self.plan.table.length)

    @cached_property
    def corners(self) -> tuple[Corner, ...]:
        """The shortest and the longest documents, with most tokens that have a loss and with fewest."""
        table = self.plan.table
        lengths = np.asarray(table.length, np.float64)
        shares = np.stack([table.supervised / lengths, *(row / lengths for row in table.mtp)])
        found = {
            (int(length), tuple(share.tolist()))
            for length in (lengths.min(), lengths.max())
            for share in (shares.min(axis=1), shares.max(axis=1))
        }
        cost = self.plan.inputs.llm_cost
        return tuple(
            Corner(
                n,
                tuple(s * n for s in share),
                float(cost.of(np.asarray([n]), np.asarray([share[0] * n]))[0]),
            )
            for n, share in sorted(found)
        )

    def share(self, dp: int) -> float:
        """Cost of the data rank with most documents of the language model over the mean one's, at least,
        however they are dealt: of the k dp + 1 costliest some rank has k + 1 (Graham 1969)."""
        if dp not in self._shares:
            costs = np.sort(np.asarray(self.plan.llm_cost, np.float64))[::-1]
            until, mean = np.concatenate([[0.0], np.cumsum(costs)]), float(costs.sum()) / dp
            k = np.arange(1, (len(costs) - 1) // dp + 1)
            found = (until[k * dp + 1] - until[k * dp - k]).max(initial=costs[0])
            self._shares[dp] = max(1.0, float(found) / mean) if mean else 1.0
        return self._shares[dp]

    def dealt(self, dp: int, microbatches: int, tp: int = 1, cp: int = 1) -> Dealt:
        """The language model's documents over so many data ranks, as a step deals them."""
        key = dp, microbatches, tp, cp
        if key not in self._known:
            self._known[key] = self._dealt(*key)
        return self._known[key]

    def _dealt(self, dp: int, microbatches: int, tp: int, cp: int) -> Dealt:
        spec = {"tp": tp, "cp": cp, "sequence_parallel": tp > 1}
        layout = make_layout(SINK, dp * tp * cp, spec)
        given = replace(self.plan.inputs, llm=layout, microbatches=microbatches, encoders={})
        plan = self.planned(given)
        seats = plan.seats
        by_rank = np.bincount(seats.dp, weights=plan.llm_cost, minlength=dp)
        most = int(np.argmax(by_rank))
        mine = seats.dp == most
        costs = np.bincount(seats.microbatch[mine], weights=plan.llm_cost[mine], minlength=microbatches)
        found = [i.dealt for i in plan.imbalance(None) if i is not None]
        return Dealt(
            costs=tuple(costs.tolist()),
            plan=plan,
            most=most,
            tokens=float(plan.padded.sum(axis=0).max()) / microbatches,
            light=float(plan.padded.sum(axis=0).min()) / microbatches,
            thin=float(plan.padded.min()),
            even=float(by_rank.mean() / by_rank[most]) if by_rank[most] else 1.0,
            share=sum(1 / x for x in found) / len(found) if found else 1.0,
        )

    def corner_load(
        self, corner: Corner, tokens: int, tp: int, *, seen: bool = False, up: bool = False
    ) -> TokenLoad:
        """About so many tokens of equal documents. seen: whether a query has the keys alone that it sees, the
        mean number of them: of documents that cross cp the others are left out. up: whether a part of a token
        with a loss is one."""
        n, length, window = max(1, tokens // corner.length), corner.length, self.blueprint.llm.window
        every = Bucket(n, length, length, n * length)
        return TokenLoad(
            tokens=n * length,
            routed=n * length // tp,
            documents=n,
            attended=Attended((every._replace(keys=-(-length // 2)) if seen else every,), n == 1),
            supervised=tuple((math.ceil if up else math.floor)(n * s) for s in corner.supervised),
            windowed=None if window is None else windowed(Attended((every,), n == 1), window),
        )
