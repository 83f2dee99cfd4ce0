"""The step plan: what every rank loads, computes and exchanges in one step, as plain data.

It is a pure function of (config, index, seed, step, known-bad samples): every rank derives the same plan, and
ranks agree on nothing at run time (law 4). What all ranks need of each other is in columns over the whole
step. Micro-batches are views of them, and what only some ranks or tools need is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from llm.counts import Counts
from mm.config.outline import SINK
from mm.data.sample import Part, Sample
from mm.plan.dealing import Packed, Seats, by_count, deal_packed, deal_samples, load_imbalance
from mm.plan.inputs import PlanInputs
from mm.plan.items import EdgeItems, add_work, edge_items
from mm.plan.subsets import Subsets
from mm.plan.table import Costs, SampleTable, fingerprint
from parallel.boundary import (
    ItemColumns,
    Joint,
    RowMap,
    dest_side,
    joint_streams,
    row_counts,
    row_positions,
    sharing,
    source_side,
)
from parallel.sequence.intervals import Column, before, sums


class Edge(NamedTuple):
    """From an encoder to a stage of the language model that its rows enter."""

    source: str  # name of the encoder's module
    stage: int  # index among the language model's pp * vpp stages


@dataclass(frozen=True)
class ItemPlan:
    """One item of a micro-batch."""

    sample: int  # index of its sample in the micro-batch
    part: Part
    rows: int  # that its encoder makes of it
    cost: float  # as its encoder estimates it, in the encoder's own unit
    llm_dp: int  # dp rank of the language model that packs its sample
    position: int  # token position of its first row in the packed sequence of llm_dp
    source_dp: int  # dp rank of the encoder that computes it
    same_as: int | None  # the earlier item of the micro-batch whose rows it reads; None where it has its own


@dataclass(frozen=True)
class Imbalance:
    """Cost of a module's costliest dp rank over the mean of all its dp ranks; 1 is even.

    dealt: as items, or samples, are dealt. by_sample: were each item on the dp rank of its sample; for the
    language model, were samples dealt in order and by number.
    """

    dealt: float
    by_sample: float


@dataclass(frozen=True, eq=False)
class StepPlan:
    """A step, with its samples in order of micro-batch and then of the batch: "lines" are in this order.
    order: by line, the sample's index in the batch. table: of the samples. bounds: by micro-batch and at the
    end, its first line, [microbatches + 1]. seats: by line, where the sample goes. start: by line, the
    sample's first token in the packed sequence. filled: tokens of each packed sequence without padding, and
    tokens: with it, [microbatches, dp]. items: by encoder. ends: the cursor behind it (mm/plan/batches.py),
    where samples are packed. memo: by name, what is worked out from the plan once.
    """

    step: int
    inputs: PlanInputs
    order: Column
    table: SampleTable
    bounds: Column
    seats: Seats
    start: Column
    filled: Column
    padded: Column
    items: Mapping[str, EdgeItems]
    ends: tuple[int, int] | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def microbatches(self) -> tuple[Microbatch, ...]:
        """By micro-batch, a view of its part of the plan."""
        return tuple(Microbatch(self, k) for k in range(len(self.bounds) - 1))

    @cached_property
    def sample_ids(self) -> tuple[int, ...]:
        """Ids of the samples in order of the batch."""
        return tuple(self._of_batch(self.table.ids).tolist())

    @cached_property
    def subsets(self) -> Subsets:
        """Its samples by modality and by data set."""
        return Subsets.of_table(self.table)

    @cached_property
    def supervised(self) -> int:
        """Tokens of the whole step that the loss is divided by (law 2)."""
        return int(self.table.supervised.sum())

    @cached_property
    def mtp_supervised(self) -> tuple[int, ...]:
        """Tokens with a loss at each depth of multi-token prediction."""
        return tuple(self.table.mtp.sum(axis=1).tolist())

    @cached_property
    def digests(self) -> np.ndarray:
        """A 63-bit fingerprint of what is planned from each sample alone, in order of the batch; int64
        [samples]. Where a sample goes depends on all others, so it would name samples that are alike."""
        lines = zip(self.table.ids.tolist(), self.table.length.tolist(), strict=True)
        parts = [list(line) for line in lines]
        for k, items in enumerate(self.items.values()):
            for j, rows in zip(items.sample.tolist(), items.columns.rows.tolist(), strict=True):
                parts[j] += (k, rows)
        found = np.asarray([fingerprint(np.asarray(p, dtype=np.int64)) for p in parts], dtype=np.int64)
        return self._of_batch(found)

    @cached_property
    def digest(self) -> int:
        """A 63-bit fingerprint of the whole plan, which must be equal on all ranks."""
        table, edges = self.table, [e.columns for e in self.items.values()]
        head = np.asarray([self.step, self.supervised, *self.mtp_supervised, len(self.order)], dtype=np.int64)
        samples = (self.order, table.ids, table.length, self.seats.microbatch, self.seats.dp, self.padded)
        items = [c for e in edges for c in (e.batch, e.own_rows, e.position, e.dest_dp, e.source_dp)]
        return fingerprint(head, *samples, *items)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return int(self.table.length.sum())

    @property
    def counts(self) -> Counts:
        """What the language model's other objectives are means over."""
        return Counts(self.tokens, self.mtp_supervised)

    @cached_property
    def active(self) -> list[set[str]]:
        """By micro-batch, the encoders that have at least one item on any rank."""
        return [
            {m for m, e in self.items.items() if e.bounds[k] < e.bounds[k + 1]}
            for k in range(len(self.bounds) - 1)
        ]

    @cached_property
    def llm_cost(self) -> Costs:
        """By line, the forward FLOPs of the sample in the language model."""
        return self.inputs.llm_cost.of(self.table.length, self.table.supervised)

    def imbalance(self, module: str | None) -> list[Imbalance | None]:
        """By micro-batch, that of an encoder, or of the language model for None; None where it has none."""
        n, inputs = len(self.bounds) - 1, self.inputs
        if module is None:
            cost, dp = self.llm_cost, inputs.llm.dp
            plain = by_count(len(cost), n, dp)
            dealt = load_imbalance(cost, *self.seats, n, dp)
            other = load_imbalance(self._of_batch(cost), *plain, n, dp)
            some = np.diff(self.bounds) > 0
        else:
            e, dp = self.items[module], inputs.encoders[module].layout.dp
            dealt = load_imbalance(e.cost, e.columns.batch, e.columns.source_dp, n, dp)
            other = load_imbalance(e.cost, e.columns.batch, e.home, n, dp)
            some = np.diff(e.bounds) > 0
        both = zip(some.tolist(), dealt.tolist(), other.tolist(), strict=True)
        return [Imbalance(now, plain) if any_ else None for any_, now, plain in both]

    def _of_batch(self, column: np.ndarray) -> np.ndarray:
        """A column over lines in the order of the batch."""
        out = np.empty_like(column)
        out[self.order] = column
        return out


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One micro-batch of a step: a view. Its samples are in the order of the batch."""

    plan: StepPlan
    index: int

    @property
    def _lines(self) -> slice:
        return slice(int(self.plan.bounds[self.index]), int(self.plan.bounds[self.index + 1]))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Its samples."""
        return tuple(map(self.sample, range(self._lines.stop - self._lines.start)))

    def sample(self, j: int) -> Sample:
        """One of its samples; a rank looks up only those that it reads."""
        return self.plan.table.sample(self._lines.start + j)

    @cached_property
    def dp_of(self) -> tuple[int, ...]:
        """By sample, the dp rank of the language model that packs it."""
        return tuple(self.plan.seats.dp[self._lines].tolist())

    @cached_property
    def length(self) -> tuple[int, ...]:
        """By sample, in tokens."""
        return tuple(self.plan.table.length[self._lines].tolist())

    @cached_property
    def subset(self) -> Column:
        """By sample, the index of its subset."""
        return self.plan.subsets.of[self._lines]

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """By dp rank, length of its packed sequence, padded to PlanInputs.alignment."""
        return tuple(self.plan.padded[self.index].tolist())

    @cached_property
    def edges(self) -> Mapping[str, MicrobatchEdge]:
        """By encoder module."""
        return {module: MicrobatchEdge(self, module) for module in self.plan.items}

    def see(self, js: Iterable[int]) -> None:
        """Look up samples that sample() is asked for next."""
        self.plan.table.see(self._lines.start + j for j in js)

    def samples_of(self, dp: int) -> list[int]:
        """Indices of the samples that a dp rank of the language model packs, in that order."""
        return np.flatnonzero(self.plan.seats.dp[self._lines] == dp).tolist()


@dataclass(frozen=True, eq=False)
class MicrobatchEdge:
    """The items of one encoder in one micro-batch, and where their rows are on both sides: a view."""

    microbatch: Microbatch
    module: str
    _on: dict[int, tuple[ItemPlan, ...]] = field(default_factory=dict, repr=False)  # by dp rank

    @property
    def _lines(self) -> slice:
        bounds, k = self.microbatch.plan.items[self.module].bounds, self.microbatch.index
        return slice(int(bounds[k]), int(bounds[k + 1]))

    @cached_property
    def _columns(self) -> ItemColumns:
        which = np.arange(self._lines.start, self._lines.stop)
        return self.microbatch.plan.items[self.module].columns.take(which)

    @property
    def count(self) -> int:
        """How many items."""
        return len(self._columns.rows)

    @cached_property
    def rows(self) -> int:
        """Rows of all items, those that are read several times once."""
        return int(self._columns.own_rows.sum())

    @cached_property
    def cost(self) -> float:
        """Cost of all items, in the encoder's unit."""
        return float(self.microbatch.plan.items[self.module].cost[self._lines].sum())

    @cached_property
    def items(self) -> tuple[ItemPlan, ...]:
        """In order of global row id."""
        return self._plans(np.arange(self.count))

    def items_on(self, dp: int) -> tuple[ItemPlan, ...]:
        """The items that a dp rank of the encoder computes, in order of global row id."""
        if dp not in self._on:
            mine, own = self._columns.source_dp == dp, self._columns.own
            self._on[dp] = self._plans(np.flatnonzero(mine if own is None else mine & own))
        return self._on[dp]

    def _plans(self, which: Column) -> tuple[ItemPlan, ...]:
        plan, lines = self.microbatch.plan, self._lines.start + which
        items, table = plan.items[self.module], plan.table
        nth = lines - table.items[self.module].first[items.sample[lines]]
        c = items.columns
        first = np.arange(len(c.rows)) if c.first is None else c.first
        table.see(items.sample[lines].tolist())
        columns = (items.sample, items.cost, c.rows, c.dest_dp, c.position, c.source_dp, first)
        return tuple(
            ItemPlan(
                sample=line - int(plan.bounds[self.microbatch.index]),
                part=table.part(self.module, line, k),
                rows=rows,
                cost=cost,
                llm_dp=llm_dp,
                position=position,
                source_dp=source_dp,
                same_as=None if own == at else own - self._lines.start,
            )
            for at, k, line, cost, rows, llm_dp, position, source_dp, own in zip(
                lines.tolist(), nth.tolist(), *(column[lines].tolist() for column in columns), strict=True
            )
        )

    @cached_property
    def source(self) -> RowMap:
        """The rows as the encoder's last pipeline rank gives them."""
        layout = self.microbatch.plan.inputs.encoders[self.module].layout
        c = self._columns
        own = slice(None) if c.own is None else c.own
        return source_side(layout, c.rows[own], c.source_dp[own], self._joint)

    @property
    def _joint(self) -> Joint | None:
        plan, k = self.microbatch.plan, self.microbatch.index
        use, c = plan.inputs.encoders[self.module], plan.items[self.module].columns
        if use.at_once == 1:
            return None
        n, dp = len(plan.bounds) - 1, use.layout.dp
        joint = joint_streams(sums(c.own_rows, c.batch * dp + c.source_dp, n * dp), dp, use.at_once)
        return Joint(*(a[k * dp : (k + 1) * dp] for a in joint))

    def items_at_once(self, dp: int) -> tuple[int, list[ItemPlan]]:
        """What a dp rank of the encoder computes together with these items: how many items of earlier
        micro-batches, and all."""
        plan, k = self.microbatch.plan, self.microbatch.index
        n = plan.inputs.encoders[self.module].at_once
        group = plan.microbatches[k // n * n : k // n * n + n]
        found = [mb.edges[self.module].items_on(dp) for mb in group]
        return sum(map(len, found[: k % n])), [item for items in found for item in items]

    @cached_property
    def dest(self) -> RowMap:
        """The rows as the language model's first pipeline rank reads them; others read their levels of these
        rows."""
        inputs, c = self.microbatch.plan.inputs, self._columns
        tokens = self.microbatch.tokens
        side = dest_side(inputs.llm, c.rows, c.dest_dp, c.position, tokens, order=inputs.order)
        return side if c.first is None else sharing(side, c.rows, c.first)

    def row_positions(self, rank: int) -> Column:
        """Token positions of the boundary rows in the share of the language model's `rank`; int64 [R]."""
        inputs, mb = self.microbatch.plan.inputs, self.microbatch
        c = self._columns.take(np.flatnonzero(self._columns.dest_dp == inputs.llm.coord(rank).dp))
        return row_positions(inputs.llm, rank, c.rows, c.dest_dp, c.position, mb.tokens, order=inputs.order)

    @property
    def row_counts(self) -> Column:
        """How many row_positions() each rank has; as parallel.boundary.row_counts()."""
        inputs, c, tokens = self.microbatch.plan.inputs, self._columns, self.microbatch.tokens
        return row_counts(inputs.llm, c.rows, c.dest_dp, c.position, tokens, order=inputs.order)


def plan_step(step: int, samples: Sequence[Sample], inputs: PlanInputs) -> StepPlan:
    """Plan one step over `samples`, the whole global batch in order. Raises DataError (sample_length)."""
    return plan_table(step, SampleTable.of(samples, inputs), inputs)


def plan_table(step: int, batch: SampleTable, inputs: PlanInputs, packed: Packed | None = None) -> StepPlan:
    """plan_step() over samples in columns, without a loop over samples: O(n log n) in samples and items.

    packed: which of them go to one dp rank together; None where all are dealt one by one.
    """
    n, dp = inputs.microbatches, inputs.llm.dp
    cost = inputs.llm_cost.of(batch.length, batch.supervised)
    others = [items.cost_by_sample for items in batch.items.values()]
    if packed is None:
        dealt = deal_samples(cost, batch.length, others, n, dp)
    else:
        dealt = deal_packed(cost, batch.length, packed, others, n, dp)
    order = np.argsort(dealt.microbatch, kind="stable")
    table, seats = batch.take(order), Seats(dealt.microbatch[order], dealt.dp[order])
    place = seats.microbatch * dp + seats.dp
    filled = sums(table.length, place, n * dp)
    # A dp rank packs its samples end to end in their order.
    turn = np.argsort(place, kind="stable")
    start = np.empty_like(place)
    start[turn] = before(table.length[turn]) - before(filled)[place[turn]]
    # Every rank gets an equal share of at least one token: no collective then meets an empty tensor.
    unit = inputs.alignment
    work = np.zeros((n, 1 + max(r for x in inputs.layouts for r in x.ranks)))
    add_work(cost[order], seats, inputs.llm, inputs.passes_of(SINK), work)
    return StepPlan(
        step=step,
        inputs=inputs,
        order=order,
        table=table,
        bounds=np.searchsorted(seats.microbatch, np.arange(n + 1)),
        seats=seats,
        start=start,
        filled=filled.reshape(n, dp),
        padded=(np.maximum(1, -(-filled // unit)) * unit).reshape(n, dp),
        items={module: edge_items(module, table, seats, start, inputs, work) for module in inputs.encoders},
    )
