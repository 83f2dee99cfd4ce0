"""The items of one encoder in a step: who computes each, once however often a stream has it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mm.plan.dealing import Seats, deal_items, home_ranks, over_step
from mm.plan.inputs import PlanInputs
from mm.plan.table import Costs, SampleTable
from parallel.boundary import ItemColumns
from parallel.sequence.dealing import loads
from parallel.sequence.intervals import Column, column, repeat_groups
from parallel.topology.layout import Layout


@dataclass(frozen=True, eq=False)
class EdgeItems:
    """The items of one encoder in a step, a line an item, in order of micro-batch and then of global row.

    bounds: by micro-batch and at the end, the index of its first item, [microbatches + 1]. sample: its line
    in StepPlan.table. home: the encoder's dp rank beside its sample. cost: in the encoder's unit, 0 where an
    item reads the rows of an earlier one. columns: everything that the boundary needs.

    An item that a dp rank of the language model reads several times in a micro-batch is computed once.
    """

    bounds: Column
    sample: Column
    home: Column
    cost: Costs
    columns: ItemColumns


def edge_items(
    module: str, table: SampleTable, seats: Seats, start: Column, inputs: PlanInputs, work: Costs
) -> EdgeItems:
    """Deal the items of encoder `module` to its dp ranks. start: by sample, its first token.

    work: what each rank of the job computes of other modules, in forward and backward, [microbatches, ranks];
    that of this encoder is added.
    """
    use, items, n = inputs.encoders[module], table.items[module], inputs.microbatches
    sample = repeat_groups(np.zeros_like(items.of), items.of)[0]
    microbatch = seats.microbatch[sample]
    # Samples go to the encoder's dp ranks as to the language model's: equal dp sizes need no traffic.
    home = home_ranks(*seats, inputs.llm.dp, use.layout.dp)[sample]
    same = _same_items(seats, sample, items.content, inputs.llm.dp)
    dealt, cost = home, items.cost
    ranks, passes = _ranks_of(use.layout), inputs.passes_of(module)
    # Ranks of one dp rank wait for each other, so the busiest of them counts; they share what it computes.
    already = work[:, ranks].max(axis=2) * (ranks.shape[1] / passes)
    if same is None:
        if use.deal == "cost":
            dealt = _dealt(cost, microbatch, home, already)
    else:
        own = same == np.arange(len(same))
        cost = np.where(own, cost, 0.0)
        if use.deal == "cost":
            dealt = home.copy()
            dealt[own] = _dealt(cost[own], microbatch[own], home[own], already)
        dealt = dealt[same]
    add_work(cost, Seats(microbatch, dealt), use.layout, passes, work)
    return EdgeItems(
        bounds=np.searchsorted(microbatch, np.arange(n + 1)),
        sample=sample,
        home=home,
        cost=cost,
        columns=ItemColumns(
            batch=microbatch,
            rows=items.rows,
            source_dp=dealt,
            dest_dp=seats.dp[sample],
            position=start[sample] + items.offset,
            first=same,
        ),
    )


def _dealt(cost: Costs, microbatch: Column, home: Column, already: Costs) -> Column:
    """deal_items(), and over_step() on ranks that compute nothing else: no row is spared its way there."""
    if already.shape[1] == 1:
        return home
    dealt = deal_items(cost, microbatch, home, already)
    return dealt if already.any() else over_step(cost, microbatch, dealt, *already.shape)


def add_work(cost: Costs, seats: Seats, layout: Layout, passes: float, work: Costs) -> None:
    """Add to `work` (edge_items) what a module's ranks compute of samples, or items, of these forward costs.

    seats: of each. passes: forward and backward as a multiple of the forward. The pp, cp and tp ranks of a dp
    rank have equal parts of it.
    """
    ranks, n = _ranks_of(layout), len(work)
    load = loads(cost, seats.microbatch * layout.dp + seats.dp, n * layout.dp).reshape(n, -1)
    work[:, ranks] += load[:, :, None] * (passes / ranks.shape[1])


@lru_cache(maxsize=16)
def _ranks_of(layout: Layout) -> Column:
    """By dp rank, the ranks of the job that it consists of: [dp, ranks]."""
    ranks = np.asarray(layout.ranks)
    of = np.asarray([layout.coord(r).dp for r in layout.ranks])
    return column(ranks[np.argsort(of, kind="stable")]).reshape(layout.dp, -1)


def _same_items(seats: Seats, sample: Column, content: Column, dp: int) -> Column | None:
    """By item, the first with its content that the same dp rank of the language model reads in the same
    micro-batch; None where all are the first. O(n log n) in items, and less where none comes twice in a step
    of a small data set."""
    if int(content.max(initial=0)) < 4 * len(content) and int(np.bincount(content).max(initial=0)) <= 1:
        return None
    place = seats.microbatch[sample] * dp + seats.dp[sample]
    key = place * (1 + int(content.max(initial=0))) + content
    ascending = np.sort(key)
    if np.all(ascending[1:] != ascending[:-1]):
        return None
    found = np.unique(key, return_index=True, return_inverse=True)
    first: Column = found[1][found[2]]
    return first
