"""One rank's plans of an edge for all micro-batches of a step at once. Pure.

The maps of the micro-batches are stacked as one: rank r of map b is number b stride + r. Of each map only
those items are in it that can matter to this rank: the items of its own streams, and of the streams that
these are exchanged with. So a rank plans its own part: what is left that grows with all items is O(items) in
a few columns, namely where items lie in their streams and whether any rank moves anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from parallel.boundary.nodes import Flags, second_hops, spare_enough
from parallel.boundary.plan import EdgePlan, check_held, layers_of, moves, transfers
from parallel.boundary.repeats import repeats_of
from parallel.boundary.routes import Own, offers_of
from parallel.boundary.rows import RowMap
from parallel.boundary.runs import split_at_ends
from parallel.boundary.sides import (
    Joint,
    TokenRuns,
    held_runs,
    held_tiles,
    joint_streams,
    lane_ranks,
    read_runs,
    shared_rows,
)
from parallel.boundary.still import Reads, partners, still_plans, whole_positions, whole_streams
from parallel.sequence.intervals import Column, before, repeat_groups, sums
from parallel.sequence.stream import Order
from parallel.topology.layout import Layout


@dataclass(frozen=True)
class ItemColumns:
    """Items of an edge, a line an item, in order of micro-batch and then of global row.

    batch: its micro-batch. rows: that it has. source_dp, dest_dp: dp ranks that compute it and that read it.
    position: of its first row in the packed stream of dest_dp. first: by item, the index of the item whose
        rows it reads: itself, or an earlier one of its micro-batch, both dp ranks and number of rows, which
        is then computed and sent once. None where each has rows of its own.
    """

    batch: Column
    rows: Column
    source_dp: Column
    dest_dp: Column
    position: Column
    first: Column | None = None

    def take(self, which: Column) -> ItemColumns:
        """The items with these indices, in this order, which have those whose rows they read among them."""
        return ItemColumns(
            batch=self.batch[which],
            rows=self.rows[which],
            source_dp=self.source_dp[which],
            dest_dp=self.dest_dp[which],
            position=self.position[which],
            first=self.first_of(which),
        )

    def first_of(self, which: Column) -> Column | None:
        """`first` of the items with these indices, as indices into `which`."""
        if self.first is None:
            return None
        at = np.zeros_like(self.rows)
        at[which] = np.arange(len(which))
        return at[self.first[which]]

    @cached_property
    def own(self) -> Flags | None:
        """Whether an item has rows of its own; None where all have."""
        return None if self.first is None else self.first == np.arange(len(self.rows))

    @cached_property
    def own_rows(self) -> Column:
        """By item, the rows of its own."""
        return self.rows if self.own is None else np.where(self.own, self.rows, 0)

    @cached_property
    def shared(self) -> Column:
        """Indices of the items whose rows several items read."""
        if self.first is None:
            return np.zeros(0, dtype=np.int64)
        readers = np.bincount(self.first, minlength=len(self.rows))
        return np.flatnonzero((readers[self.first] > 1) & (self.rows > 0))


@dataclass(frozen=True)
class Stack:
    """An edge in all micro-batches of a step.

    source, dest: layouts of the encoder and of the language model. stage: pipeline rank of dest that reads.
    items: their dp ranks exist, and they lie in their streams without overlap. tokens: length of each packed
    stream, [batches, dp of dest]. order: how cp splits streams. at_once: micro-batches that the encoder
    computes at once, from the first on: its ranks split the rows of all of them.
    """

    source: Layout
    dest: Layout
    stage: int
    items: ItemColumns
    tokens: Column
    order: Order
    at_once: int = 1

    @property
    def batches(self) -> int:
        """How many micro-batches."""
        return len(self.tokens)

    @cached_property
    def source_stream(self) -> Column:
        """By item, the encoder's stream that it is in, numbered over micro-batches."""
        return self.items.batch * self.source.dp + self.items.source_dp

    @cached_property
    def dest_stream(self) -> Column:
        """By item, the language model's stream that it is in, numbered over micro-batches."""
        return self.items.batch * self.dest.dp + self.items.dest_dp

    @cached_property
    def source_total(self) -> Column:
        """Rows of each of the encoder's streams."""
        return sums(self.items.own_rows, self.source_stream, self.batches * self.source.dp)

    @cached_property
    def joint(self) -> Joint | None:
        """By stream of the encoder, where it lies in what micro-batches have together; None where each is
        computed alone."""
        return None if self.at_once == 1 else joint_streams(self.source_total, self.source.dp, self.at_once)

    @cached_property
    def source_at(self) -> Column:
        """By item, its first row in the encoder's stream."""
        stream, rows = self.source_stream, self.items.own_rows
        order = np.argsort(stream, kind="stable")
        at = np.empty_like(rows)
        at[order] = before(rows[order]) - before(self.source_total)[stream[order]]
        return at


def plan_stack(
    name: str,
    stack: Stack,
    rank: int,
    *,
    node_size: int | None = None,
    spares: float = 0.0,
    row_shape: tuple[int, ...] | None = None,
) -> tuple[EdgePlan, ...]:
    """plan_edge() of `rank` for each micro-batch, from source_side() and dest_side() of its items.

    O(n log n) time in what this rank and those that it exchanges rows with hold and want; O(items + ranks)
    in a few columns, and O(n log n) in all items whose rows are read several times.
    """
    if _still(stack):
        reads = rank in stack.dest.stage_ranks(stack.stage)
        return still_plans(name, rank, _reads(stack, stack.dest.coord(rank).dp if reads else -1), row_shape)
    places = _Places.of(stack, rank, node_size)
    source, dest = own_maps(stack, rank, node_size)
    base = np.arange(stack.batches) * places.stride
    own = Own(rank + base, base)
    forward, first = _facts(stack, places, node_size, spares)
    count, more = _more_layers(stack, places.stride, node_size, spares)
    there = transfers(source, dest, own, node_size=node_size, relayed=forward.relayed, moving=forward.moving)
    back = [
        transfers(layer, source, own, node_size=node_size, relayed=facts.relayed, moving=facts.moving)
        for layer, facts in zip(layers_of(dest, 1 + len(more)), [first, *more], strict=True)
    ]
    repeats = repeats_of(dest.copies, dest.lanes_of(own.rank))
    return tuple(
        EdgePlan(name, f, tuple(b[:n]), row_shape, again)
        for n, f, again, *b in zip(count.tolist(), there, repeats, *back, strict=True)
    )


def own_maps(stack: Stack, rank: int, node_size: int | None = None) -> tuple[RowMap, RowMap]:
    """Both sides of the items that matter to this rank, micro-batches stacked."""
    places = _Places.of(stack, rank, node_size)
    return _maps(stack, _relevant(stack, places, node_size is not None), places.stride)


def stack_positions(stack: Stack, rank: int) -> tuple[Column, ...]:
    """row_positions() of `rank`, which is one of the language model's, in each micro-batch."""
    at, parts = stack.dest.coord(rank), stack.dest.token_shards
    if whole_streams(stack.dest):
        return whole_positions(_reads(stack, at.dp))
    own = np.arange(stack.batches) * stack.dest.dp + at.dp
    items = stack.items.take(np.flatnonzero(stack.items.dest_dp == at.dp))
    length = stack.tokens.reshape(-1)[own]
    runs = read_runs(
        stack.dest, items.rows, items.position + before(length)[items.batch], length, stack.order
    )
    lane = at.cp * parts + (at.tp if parts > 1 else 0)
    batch, part = np.divmod(runs.lane, stack.dest.cp * parts)
    mine = np.flatnonzero(part == lane)
    token = repeat_groups(runs.token[mine], runs.length[mine])[1]
    ends = np.cumsum(np.bincount(batch[mine], runs.length[mine], stack.batches).astype(np.int64))
    return tuple(np.split(token, ends[:-1]))


def _still(stack: Stack) -> bool:
    """Whether every item is computed by the very ranks that read it, which do not split its rows."""
    partner, c = partners(stack.source, stack.dest, stack.stage), stack.items
    near = partner is not None and ((partner[c.dest_dp] == c.source_dp) | (c.rows == 0)).all()
    return bool(near) and c.first is None


def _reads(stack: Stack, dp: int) -> Reads:
    """The items that have rows and that a dp rank reads; none for -1."""
    items = stack.items
    own = np.flatnonzero((items.dest_dp == dp) & (items.rows > 0))
    return Reads(items.batch[own], items.rows[own], items.position[own], stack.batches)


class _Places(NamedTuple):
    """Where this rank is: its dp rank in the source's last stage, and in the reading stage of dest; -1 where
    it has no rows of that side. stride: ranks of a map in a stack."""

    source_dp: int
    dest_dp: int
    stride: int

    @staticmethod
    def of(stack: Stack, rank: int, node_size: int | None) -> _Places:
        ends = ((stack.source, stack.source.pp - 1), (stack.dest, stack.stage))
        at = [e.coord(rank) if rank in e.stage_ranks(stage) else None for e, stage in ends]
        unit = node_size or 1
        highest = max(rank, *stack.source.ranks, *stack.dest.ranks)
        dp = [-1 if coord is None else coord.dp for coord in at]
        return _Places(dp[0], dp[1], (highest // unit + 1) * unit)


def _relevant(stack: Stack, places: _Places, nodes: bool) -> Column:
    """Indices of the items that matter to this rank.

    A rank gets rows from the lanes that hold what it wants, and gives to those that want what it holds. Which
    replica sends to whom follows from all readers of a lane: so from all items of its stream. With nodes,
    where rows enter a node follows from all rows that a reader's lane wants there.
    """
    held, read = stack.source_stream, stack.dest_stream
    own_held, own_read = stack.items.source_dp == places.source_dp, stack.items.dest_dp == places.dest_dp

    def with_streams(chosen: Flags, stream: Column, streams: int) -> Flags:
        """All items of the streams of the chosen items."""
        touched = np.zeros(streams, dtype=bool)
        touched[stream[chosen]] = True
        return touched[stream]

    helds, reads = (stack.batches * layout.dp for layout in (stack.source, stack.dest))
    forward = own_held | with_streams(own_read, held, helds)
    backward = own_read | with_streams(own_held, read, reads)
    if nodes:
        forward = with_streams(forward, read, reads)
        backward = with_streams(backward, held, helds)
    return np.flatnonzero((forward | backward) & (stack.items.rows > 0))


def _maps(stack: Stack, which: Column, stride: int) -> tuple[RowMap, RowMap]:
    """Both sides of these items, micro-batches stacked; lanes without any of their rows are left out."""
    rows, first = stack.items.rows[which], stack.items.first_of(which)
    held = np.arange(len(which)) if first is None else np.flatnonzero(first == np.arange(len(which)))
    streams, stream = np.unique(stack.source_stream[which[held]], return_inverse=True)
    total = stack.source_total[streams]
    joint = stack.joint and Joint(*(column[streams] for column in stack.joint))
    tiles = held_tiles(stack.source, total, joint)
    runs = held_runs(rows[held], stack.source_at[which[held]] + before(total)[stream], tiles)
    source = _stacked((stack.source, stack.source.pp - 1), streams, stride, runs, tiles[1] - tiles[0])
    streams, stream = np.unique(stack.dest_stream[which], return_inverse=True)
    length = stack.tokens.reshape(-1)[streams]
    at = stack.items.position[which] + before(length)[stream]
    row = None if first is None else shared_rows(rows, first)
    runs = read_runs(stack.dest, rows, at, length, stack.order, row)
    size = sums(runs.length, runs.lane, len(streams) * stack.dest.cp * stack.dest.token_shards)
    packed = replace(runs, token=before(runs.length) - before(size)[runs.lane])
    dest = _stacked((stack.dest, stack.stage), streams, stride, packed, size)
    return source, dest if first is None else dest.once()


def _stacked(end: tuple[Layout, int], streams: Column, stride: int, runs: TokenRuns, rows: Column) -> RowMap:
    """A map of the lanes that have runs. end: a layout and its pipeline rank. streams: as numbered over
    micro-batches. runs: with local rows for tokens. rows: by lane of the runs."""
    layout, stage = end
    used, lane = np.unique(runs.lane, return_inverse=True)
    parts = layout.cp * layout.token_shards
    batch, dp = np.divmod(streams[used // parts], layout.dp)
    ranks = lane_ranks(layout, [stage])[dp * parts + used % parts] + (batch * stride)[:, None]
    return RowMap(
        lanes=tuple(map(tuple, ranks.tolist())),
        start=runs.row,
        length=runs.length,
        lane=lane,
        local=runs.token,
        rows=rows[used],
    )


class _Facts(NamedTuple):
    """Of one transfer, what is equal on all ranks: by micro-batch, whether any row moves, and whether
    rows take second hops."""

    moving: Sequence[bool]
    relayed: Sequence[bool]


def _facts(stack: Stack, places: _Places, node_size: int | None, spares: float) -> list[_Facts]:
    """Those of the forward, and of the first layer of the backward.

    An item whose two dp ranks have no rank in common moves in both directions. One whose dp ranks have no
    node in common enters every node that wants it, and is relayed where all ranks that share a lane and a
    node are enough to share what enters; the more so where several lanes read a row. Other micro-batches are
    looked at rank by rank.
    """
    ends = [lane_ranks(e, [s]) for e, s in ((stack.source, stack.source.pp - 1), (stack.dest, stack.stage))]
    separate = _separate(stack, ends, 1)
    moving = [separate.copy(), separate.copy()]
    relayed = [np.zeros_like(separate), np.zeros_like(separate)]
    unsure = ~separate
    if node_size is not None:
        far = _separate(stack, ends, node_size)
        for k, wanting in enumerate(ends[::-1]):
            every, some = _hops_spare(wanting // node_size, spares)
            relayed[k] = far & every
            unsure |= ~relayed[k] & some
        unsure[stack.items.batch[stack.items.shared]] = True
    which = np.flatnonzero(unsure[stack.items.batch] & (stack.items.rows > 0))
    if len(which):
        source, dest = _maps(stack, which, places.stride)
        for k, (have, want) in enumerate(((source, dest), (layers_of(dest)[0], source))):
            found = _looked_at(stack, (have, want), places.stride, node_size, spares)
            moving[k] |= found[0]
            relayed[k] |= found[1]
    return [_Facts(m.tolist(), r.tolist()) for m, r in zip(moving, relayed, strict=True)]


def _looked_at(
    stack: Stack, sides: tuple[RowMap, RowMap], stride: int, node_size: int | None, spares: float
) -> tuple[Flags, Flags]:
    """By micro-batch, whether any row moves and whether rows take second hops. sides: who has rows and who
    wants them, of all ranks, micro-batches stacked."""
    have, want = sides
    moving, relayed = np.zeros((2, stack.batches), dtype=bool)
    found = moves(have, want, check_held(want, offers_of(have), True), want.members[0] // stride)
    moving[: len(found)] = found
    if node_size is not None:
        relayed = second_hops(have, want, node_size, spares, np.arange(stack.batches) * stride)
    return moving, relayed


def _more_layers(
    stack: Stack, stride: int, node_size: int | None, spares: float
) -> tuple[Column, list[_Facts]]:
    """By micro-batch, how many layers its gradients take: the most lanes that read one row. And the facts of
    the layers after the first, which only items with several readers have."""
    layers, facts = np.ones(stack.batches, dtype=np.int64), []
    if len(stack.items.shared):
        source, dest = _maps(stack, stack.items.shared, stride)
        pieces = split_at_ends(dest.runs)
        rank, lane = dest.members
        batch = rank[np.searchsorted(lane, pieces.runs.lane)] // stride
        np.maximum.at(layers, batch, pieces.copies)
        for layer in layers_of(dest)[1:]:
            found = _looked_at(stack, (layer, source), stride, node_size, spares)
            facts.append(_Facts(found[0].tolist(), found[1].tolist()))
    return layers, facts


def _hops_spare(node: Column, spares: float) -> tuple[bool, bool]:
    """Whether second hops spare enough wherever rows cross, and whether they may anywhere. node: of the ranks
    of each lane that wants rows, [lanes, ranks a lane]."""
    size = (node[:, :, None] == node[:, None, :]).sum(axis=2)  # ranks of the lane on the node of each
    # A share that is enough everywhere is enough of all, and likewise one that is too few.
    every = (size - 1 >= spares * size).all() and (size > 1).any(axis=1).all()
    return bool(every), bool(spare_enough(size - 1, size, spares).any())


def _separate(stack: Stack, ends: Sequence[Column], unit: int) -> Flags:
    """By micro-batch, whether an item's two dp ranks have no group of `unit` ranks in common. ends: ranks of
    each lane, of both sides."""
    layouts, items = (stack.source, stack.dest), stack.items
    shared = np.zeros((stack.source.dp, stack.dest.dp), dtype=bool)
    of_dp = []
    for layout, lanes in zip(layouts, ends, strict=True):
        group = lanes.reshape(layout.dp, -1) // unit
        keys = np.unique(np.arange(layout.dp)[:, None] + group * layout.dp)
        of_dp.append(np.divmod(keys, layout.dp))
    (held_group, held_dp), (read_group, read_dp) = of_dp
    first = np.searchsorted(read_group, held_group, side="left")
    size = np.searchsorted(read_group, held_group, side="right") - first
    k, index = repeat_groups(first, size)
    shared[held_dp[k], read_dp[index]] = True
    witness = ~shared[items.source_dp, items.dest_dp] & (items.rows > 0)
    return np.bincount(items.batch, witness, stack.batches) > 0
