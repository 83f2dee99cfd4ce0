"""Both sides of an edge, derived from layouts: which ranks hold an encoder's rows, which read them. Pure.

Rows are numbered globally, item after item. Each dp rank of a module has one stream of rows or tokens. A
stream is split into tiles, at least one for each rank of the dp rank; an item's rows are on the ranks of the
tiles that they meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from parallel.boundary.rows import RowMap
from parallel.sequence.intervals import Column, before, column, meet, repeat_groups, share_start, sums
from parallel.sequence.stream import Order, alignment, context_spans
from parallel.topology.layout import Layout

Ints = Sequence[int] | Column


class Joint(NamedTuple):
    """Where streams of rows lie in streams that several micro-batches have together, because an encoder
    computes these at once. before: by stream, the rows of earlier micro-batches. total: rows of all."""

    before: Column
    total: Column


def joint_streams(total: Column, dp: int, at_once: int) -> Joint:
    """Where streams lie, of which every `at_once` micro-batches are computed at once, from the first on.

    total: rows of each stream, in order of micro-batch and then of dp rank.
    """
    batches = len(total) // dp
    n = -(-batches // at_once) * at_once
    by_group = np.zeros((n, dp), dtype=np.int64)
    by_group[:batches] = total.reshape(batches, dp)
    groups = by_group.reshape(-1, at_once, dp)
    ahead = np.cumsum(groups, axis=1) - groups
    whole = np.broadcast_to(groups.sum(axis=1, keepdims=True), groups.shape)
    return Joint(*(a.reshape(n, dp)[:batches].reshape(-1) for a in (ahead, whole)))


def source_side(layout: Layout, item_rows: Ints, item_dp: Ints, joint: Joint | None = None) -> RowMap:
    """Rows as an encoder holds them: item i, of item_rows[i] rows, is computed by dp rank item_dp[i].

    The items of a dp rank lie end to end. Their rows are split into contiguous shares over cp by
    share_start(). With sequence parallelism each share is split over tp in the same way; otherwise all tp
    ranks hold equal rows. Only the last pipeline stage holds rows.

    joint: by dp rank, for an encoder that computes several micro-batches at once. The rows of all of them are
    then split, and a rank holds those of this micro-batch that are in its share.

    Raises ValueError for columns of unequal length, negative counts and dp ranks that do not exist.
    """
    rows, dp = _items(layout, item_rows, item_dp)
    total = sums(rows, dp, layout.dp)
    order = np.argsort(dp, kind="stable")
    at = np.empty_like(rows)  # first row of each item, in all streams end to end
    at[order] = before(rows[order])
    tiles = held_tiles(layout, total, joint)
    runs = held_runs(rows, at, tiles)
    return RowMap(
        lanes=_lanes(layout, [layout.pp - 1]),
        start=runs.row,
        length=runs.length,
        lane=runs.lane,
        local=runs.token,
        rows=tiles[1] - tiles[0],
    )


def held_tiles(layout: Layout, total: Column, joint: Joint | None = None) -> tuple[Column, Column]:
    """Columns (start, stop) of the tiles of an encoder's streams, of `total` rows each, all streams end to
    end: in order of (stream, cp, tp share). joint: by stream; tiles may then be empty."""
    whole = total if joint is None else joint.total
    bounds = share_start(whole[:, None], layout.cp, np.arange(layout.cp + 1))  # [streams, cp + 1]
    size, parts = np.diff(bounds)[:, :, None], layout.token_shards
    begin = bounds[:, :-1, None] + share_start(size, parts, np.arange(parts))  # [streams, cp, tp share]
    if joint is not None:
        begin = np.clip(begin - joint.before[:, None, None], 0, total[:, None, None])
    start = (begin + before(total)[:, None, None]).reshape(-1)
    return start, np.append(start[1:], total.sum())


def held_runs(rows: Column, at: Column, tiles: tuple[Column, Column]) -> TokenRuns:
    """The runs of an encoder's items; a lane is a tile of held_tiles(), and `token` a local row of it.

    rows: by item. at: its first row, all streams end to end.
    """
    start, stop = tiles
    item, tile, low, high = meet(at, at + rows, start, stop)
    row = before(rows)[item] + low - at[item]
    return TokenRuns(row=row, length=high - low, lane=tile, token=low - start[tile])


def dest_side(
    layout: Layout,
    item_rows: Ints,
    item_dp: Ints,
    item_position: Ints,
    tokens: Ints,
    *,
    order: Order = "contiguous",
    stages: Sequence[int] = (0,),
) -> RowMap:
    """Rows as a language model reads them.

    Item i is read by dp rank d = item_dp[i]. Its rows enter at the positions from item_position[i] on of that
    rank's packed stream, which is tokens[d] long. Streams are split over cp by context_spans(order). With
    sequence parallelism each cp rank's share is split over tp; otherwise all tp ranks read all of it. The
    rows of a rank are in the order of its local tokens. Every pipeline stage in `stages` is a consumer of its
    own, whose gradient is added.

    Raises ValueError for what source_side() refuses, items that overlap or leave their stream, streams that
    do not split into equal shares, and stages that do not exist.
    """
    runs = _token_runs(layout, item_rows, item_dp, item_position, tokens, order)
    bad = [s for s in stages if not 0 <= s < layout.pp]
    if bad or len(set(stages)) < len(stages):
        raise ValueError(f"{layout.module}: stages {list(stages)} of 0-{layout.pp - 1}; needed: each once")
    lanes = layout.dp * layout.cp * layout.token_shards
    rows = sums(runs.length, runs.lane, lanes)
    local = before(runs.length) - before(rows)[runs.lane]
    n = len(stages)  # the same runs for each stage, on lanes of its own
    return RowMap(
        lanes=_lanes(layout, stages),
        start=np.tile(runs.row, n),
        length=np.tile(runs.length, n),
        lane=(np.arange(n)[:, None] * lanes + runs.lane).reshape(-1),
        local=np.tile(local, n),
        rows=np.tile(rows, n),
    )


def sharing(dest: RowMap, item_rows: Ints, first: Ints) -> RowMap:
    """A dest_side() of these items, some of which read the rows of another.

    first: by item, the item whose rows it reads: itself where it has rows of its own. Only such items are in
    source_side(), and rows are numbered over them.

    Raises ValueError where an item reads those of one that has none of its own, or another number of rows.
    """
    rows, of = column(item_rows), column(first)
    if len(of) != len(rows):
        raise ValueError(f"row counts of {len(rows)} items, but whose rows they read of {len(of)}")
    inside = (of >= 0) & (of < len(rows))
    held = np.where(inside, of, 0)
    wrong = np.flatnonzero(~inside | (of[held] != of) | (rows[held] != rows))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"item {i}, of {rows[i]} rows, reads those of item {of[i]}; needed: an item that has rows of its "
            "own, and as many"
        )
    some = np.flatnonzero(rows)  # an item of no rows begins where the next one does
    at = before(rows)
    item = some[np.searchsorted(at[some], dest.start, side="right") - 1]
    return replace(dest, start=dest.start - at[item] + shared_rows(rows, of)[item]).once()


def shared_rows(rows: Column, first: Column) -> Column:
    """By item, the number of its first row, where rows are numbered over the items that have their own.
    first: by item, the item whose rows it reads."""
    own = first == np.arange(len(rows))
    return before(np.where(own, rows, 0))[first]


def on_stage(layout: Layout, dest: RowMap, stage: int) -> RowMap:
    """A dest_side() of one stage, moved to pipeline stage `stage`, whose ranks split the streams in the same
    way."""
    return replace(dest, lanes=_lanes(layout, [stage]))


def row_positions(
    layout: Layout,
    rank: int,
    item_rows: Ints,
    item_dp: Ints,
    item_position: Ints,
    tokens: Ints,
    *,
    order: Order = "contiguous",
) -> Column:
    """Token positions of the rows that `rank` reads by dest_side(), in their local order; int64 [R].

    A position counts from the first token of the rank's own share of its stream.
    """
    runs = _token_runs(layout, item_rows, item_dp, item_position, tokens, order)
    at, parts = layout.coord(rank), layout.token_shards
    lane = (at.dp * layout.cp + at.cp) * parts + (at.tp if parts > 1 else 0)
    mine = np.flatnonzero(runs.lane == lane)
    return repeat_groups(runs.token[mine], runs.length[mine])[1]


def row_counts(
    layout: Layout,
    item_rows: Ints,
    item_dp: Ints,
    item_position: Ints,
    tokens: Ints,
    *,
    order: Order = "contiguous",
) -> Column:
    """How many row_positions() there are on each rank of a stage: int64 [dp, cp, tp], where tp is 1 without
    sequence parallelism."""
    runs, shape = _token_runs(layout, item_rows, item_dp, item_position, tokens, order), layout.token_shards
    lanes = (layout.dp, layout.cp, shape)
    return sums(runs.length, runs.lane, math.prod(lanes)).reshape(lanes)


@dataclass(frozen=True)
class TokenRuns:
    """Stretches of rows, a line a stretch.

    row: first global row. length: rows. lane: among those of one pipeline stage. token: first local token, or
    local row of an encoder.
    """

    row: Column
    length: Column
    lane: Column
    token: Column


def _token_runs(
    layout: Layout, item_rows: Ints, item_dp: Ints, item_position: Ints, tokens: Ints, order: Order
) -> TokenRuns:
    rows, dp = _items(layout, item_rows, item_dp)
    position, length = column(item_position), column(tokens)
    _check_streams(layout, rows, dp, position, length, order)
    return read_runs(layout, rows, position + before(length)[dp], length, order)


def read_runs(
    layout: Layout, rows: Column, at: Column, length: Column, order: Order, row: Column | None = None
) -> TokenRuns:
    """The runs of items in packed streams, in order of lane and then of local token; lanes are in order of
    (stream, cp, tp share).

    rows: by item. at: its first token, all streams end to end. length: of each stream, in tokens. row: by
    item, the number of its first row; None where rows are numbered item after item.
    """
    tiles = _tiles(layout, order)
    # All streams are split alike: the tiles of the shortest possible stream, scaled.
    unit = alignment(layout.cp, layout.token_shards, order)
    scale, base = length[:, None] // unit, before(length)[:, None]
    parts = layout.cp * layout.token_shards
    tile_lane = (np.arange(len(length))[:, None] * parts + tiles.lane).reshape(-1)
    start, stop = (tiles.start * scale + base).reshape(-1), (tiles.stop * scale + base).reshape(-1)
    tile_token = (tiles.token * scale).reshape(-1)
    item, tile, low, high = meet(at, at + rows, start, stop)
    row, lane = (before(rows) if row is None else row)[item] + low - at[item], tile_lane[tile]
    token = tile_token[tile] + low - start[tile]
    turn = np.lexsort((token, lane))
    return TokenRuns(row=row[turn], length=(high - low)[turn], lane=lane[turn], token=token[turn])


class _Tiles(NamedTuple):
    """Tiles of one stream, a line a tile, ascending: tokens [start, stop) are those from local `token` on of
    `lane`, which counts within the dp rank."""

    lane: Column
    start: Column
    stop: Column
    token: Column


def _tiles(layout: Layout, order: Order) -> _Tiles:
    """The tiles of a stream of alignment() tokens."""
    unit, parts = alignment(layout.cp, layout.token_shards, order), layout.token_shards
    width = unit // layout.cp // parts
    found = []
    for k, spans in enumerate(context_spans(unit, layout.cp, order)):
        local = 0
        for low, high in spans:
            while low < high:  # over each tp share that the span touches
                part, at = divmod(local, width)
                n = min(high - low, width - at)
                found.append((low, low + n, k * parts + part, at))
                low, local = low + n, local + n
    table = np.asarray(sorted(found), dtype=np.int64)
    return _Tiles(lane=table[:, 2], start=table[:, 0], stop=table[:, 1], token=table[:, 3])


def _lanes(layout: Layout, stages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ranks) for ranks in lane_ranks(layout, stages).tolist())


def lane_ranks(layout: Layout, stages: Sequence[int]) -> Column:
    """The ranks of each lane, in order of (stage, dp, cp, tp share): [lanes, ranks a lane]."""
    ranks = [rank for stage in stages for rank in layout.stage_ranks(stage)]
    return np.asarray(ranks, dtype=np.int64).reshape(-1, layout.tp // layout.token_shards)


def _items(layout: Layout, item_rows: Ints, item_dp: Ints) -> tuple[Column, Column]:
    """(rows, dp rank) of each item, checked."""
    rows, dp = column(item_rows), column(item_dp)
    if len(rows) != len(dp):
        raise ValueError(f"{layout.module}: row counts of {len(rows)} items, but dp ranks of {len(dp)}")
    if len(rows) and rows.min() < 0:
        raise ValueError(f"{layout.module}: item {rows.argmin()} has {rows.min()} rows")
    bad = np.flatnonzero((dp < 0) | (dp >= layout.dp))
    if len(bad):
        raise ValueError(
            f"{layout.module}: item {bad[0]} is on dp rank {dp[bad[0]]}; there are 0-{layout.dp - 1}"
        )
    return rows, dp


def _check_streams(
    layout: Layout,
    rows: Column,
    dp: Column,
    position: Column,
    tokens: Column,
    order: Order,
) -> None:
    name = layout.module
    if len(position) != len(rows) or len(tokens) != layout.dp:
        raise ValueError(
            f"{name}: {len(rows)} items at {len(position)} positions in {len(tokens)} streams; needed: a "
            f"position for each item and a stream for each of {layout.dp} dp ranks"
        )
    unit = alignment(layout.cp, layout.token_shards, order)
    bad = np.flatnonzero((tokens < 0) | (tokens % unit != 0))
    if len(bad):
        n = int(tokens[bad[0]])
        raise ValueError(
            f"{name}: the stream of dp rank {bad[0]} is {n} tokens long; {layout.describe()} ({order}) needs "
            f"a multiple of {unit}; nearest: {max(0, -(-n // unit) * unit)}"
        )
    some = np.flatnonzero(rows)
    out = some[(position[some] < 0) | (position[some] + rows[some] > tokens[dp[some]])]
    if len(out):
        i = out[0]
        raise ValueError(
            f"{name}: item {i} is at tokens {position[i]}-{position[i] + rows[i] - 1} of dp rank {dp[i]}, "
            f"whose stream is {tokens[dp[i]]} tokens long"
        )
    turn = some[np.lexsort((position[some], dp[some]))]
    ahead = (position[turn] + rows[turn])[:-1] > position[turn][1:]
    twice = np.flatnonzero(ahead & (dp[turn][:-1] == dp[turn][1:]))
    if len(twice):
        i, j = turn[twice[0]], turn[twice[0] + 1]
        raise ValueError(f"{name}: items {i} and {j} are both at token {position[j]} of dp rank {dp[j]}")
