"""Both sides of an edge as layouts give them: which ranks hold an encoder's rows, which read them. Pure.

Rows are numbered globally, item after item. A side's rows lie in streams, one for each dp rank of its module;
a stream is cut into tiles, one or more for each rank, and an item's rows fall into the tiles that they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallel.boundary.rows import RowMap
from parallel.sequence.intervals import Column, before, column, meet, repeat_groups, share_start, sums
from parallel.sequence.stream import Order, alignment, context_spans
from parallel.topology.layout import Layout

Ints = Sequence[int] | Column


def source_side(layout: Layout, item_rows: Ints, item_dp: Ints) -> RowMap:
    """Rows as an encoder holds them: item i, of item_rows[i] rows, is computed by dp rank item_dp[i].

    The items of a dp rank lie end to end. Their rows are split into contiguous shares over cp by
    share_start(). With sequence parallelism each share is split over tp in the same way; otherwise all tp
    ranks hold equal rows. Only the last pipeline stage holds rows.

    Raises ValueError for columns of unequal length, negative counts and dp ranks that do not exist.
    """
    rows, owner = _items(layout, item_rows, item_dp)
    total = sums(rows, owner, layout.dp)
    order = np.argsort(owner, kind="stable")
    at = np.empty_like(rows)  # in all streams, one after the other
    at[order] = before(rows[order])
    bounds = share_start(total[:, None], layout.cp, np.arange(layout.cp + 1))  # [dp, cp + 1]
    low, size = bounds[:, :-1, None], np.diff(bounds)[:, :, None]
    begin = low + share_start(size, layout.token_shards, np.arange(layout.token_shards))  # [dp, cp, tp share]
    start = (begin + before(total)[:, None, None]).reshape(-1)
    stop = np.append(start[1:], total.sum())
    item, tile, a, b = meet(at, at + rows, start, stop)
    first = before(rows)
    return RowMap(
        _lanes(layout, [layout.pp - 1]),
        first[item] + a - at[item],
        b - a,
        tile,
        a - start[tile],
        stop - start,
    )


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
    """Rows as a language model reads them: item i's at positions item_position[i] on of the packed stream of
    dp rank item_dp[i], which is tokens[lane] long.

    Streams are cut over cp by context_spans(order), each rank's share over tp with sequence parallelism;
    otherwise all tp ranks read all of it. A rank's rows are in the order of its local tokens. Every pipeline
    stage in `stages` reads the rows as a consumer of its own: their gradients are summed.

    Raises ValueError for what source_side() refuses, items that overlap or leave their stream, streams that
    cannot be cut into equal shares, and stages that do not exist.
    """
    runs = _token_runs(layout, item_rows, item_dp, item_position, tokens, order)
    bad = [s for s in stages if not 0 <= s < layout.pp]
    if bad or len(set(stages)) < len(stages):
        raise ValueError(f"{layout.module}: stages {list(stages)} of 0-{layout.pp - 1}; needed: each once")
    lanes = layout.dp * layout.cp * layout.token_shards
    rows = sums(runs.length, runs.lane, lanes)
    local = before(runs.length) - before(rows)[runs.lane]
    n = len(stages)
    lane = (np.arange(n)[:, None] * lanes + runs.lane).reshape(-1)
    columns = (np.tile(runs.row, n), np.tile(runs.length, n), lane, np.tile(local, n), np.tile(rows, n))
    return RowMap(_lanes(layout, stages), *columns)


def on_stage(layout: Layout, dest: RowMap, stage: int) -> RowMap:
    """The rows of a dest_side() of one stage as pipeline stage `stage` reads them: its ranks share the
    streams in the same way."""
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
    """Local token positions, in its own share of its stream, of the rows that `rank` reads by dest_side(), in
    their local order; int64 [R]."""
    runs = _token_runs(layout, item_rows, item_dp, item_position, tokens, order)
    at, parts = layout.coord(rank), layout.token_shards
    lane = (at.dp * layout.cp + at.cp) * parts + (at.tp if parts > 1 else 0)
    mine = np.flatnonzero(runs.lane == lane)
    return repeat_groups(runs.token[mine], runs.length[mine])[1]


@dataclass(frozen=True)
class _TokenRuns:
    """Stretches of rows in the order of (lane, local token): first global row, length, lane of one stage and
    first local token."""

    row: Column
    length: Column
    lane: Column
    token: Column


def _token_runs(
    layout: Layout, item_rows: Ints, item_dp: Ints, item_position: Ints, tokens: Ints, order: Order
) -> _TokenRuns:
    rows, owner = _items(layout, item_rows, item_dp)
    position, length = column(item_position), column(tokens)
    _check_streams(layout, rows, owner, position, length, order)
    # All streams are cut alike: tiles of the shortest one that can be, scaled.
    lane, low, high, local = _tiles(layout, order)
    unit = alignment(layout.cp, layout.token_shards, order)
    scale, base = length[:, None] // unit, before(length)[:, None]
    parts = layout.cp * layout.token_shards
    tile_lane = (np.arange(layout.dp)[:, None] * parts + lane).reshape(-1)
    start, stop = (low * scale + base).reshape(-1), (high * scale + base).reshape(-1)
    token = (local * scale).reshape(-1)
    at = position + before(length)[owner]
    item, tile, a, b = meet(at, at + rows, start, stop)
    token = token[tile] + a - start[tile]
    turn = np.lexsort((token, tile_lane[tile]))
    first = before(rows)[item] + a - at[item]
    return _TokenRuns(first[turn], (b - a)[turn], tile_lane[tile][turn], token[turn])


def _tiles(layout: Layout, order: Order) -> tuple[Column, Column, Column, Column]:
    """Columns (lane within the dp rank, start, stop, first local token) of a stream of alignment() tokens, in
    ascending order."""
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
    return table[:, 2], table[:, 0], table[:, 1], table[:, 3]


def _lanes(layout: Layout, stages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each lane, in order of (stage, dp, cp, tp share)."""
    ranks = [rank for stage in stages for rank in layout.stage_ranks(stage)]
    width = layout.tp // layout.token_shards
    return tuple(tuple(ranks[i : i + width]) for i in range(0, len(ranks), width))


def _items(layout: Layout, item_rows: Ints, item_dp: Ints) -> tuple[Column, Column]:
    rows, owner = column(item_rows), column(item_dp)
    if len(rows) != len(owner):
        raise ValueError(f"{layout.module}: row counts of {len(rows)} items, but dp ranks of {len(owner)}")
    if len(rows) and rows.min() < 0:
        raise ValueError(f"{layout.module}: item {rows.argmin()} has {rows.min()} rows")
    bad = np.flatnonzero((owner < 0) | (owner >= layout.dp))
    if len(bad):
        raise ValueError(
            f"{layout.module}: item {bad[0]} is on dp rank {owner[bad[0]]}; there are 0-{layout.dp - 1}"
        )
    return rows, owner


def _check_streams(
    layout: Layout,
    rows: Column,
    owner: Column,
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
    out = some[(position[some] < 0) | (position[some] + rows[some] > tokens[owner[some]])]
    if len(out):
        i = out[0]
        raise ValueError(
            f"{name}: item {i} is at tokens {position[i]}-{position[i] + rows[i] - 1} of dp rank {owner[i]}, "
            f"whose stream is {tokens[owner[i]]} tokens long"
        )
    turn = some[np.lexsort((position[some], owner[some]))]
    ahead = (position[turn] + rows[turn])[:-1] > position[turn][1:]
    twice = np.flatnonzero(ahead & (owner[turn][:-1] == owner[turn][1:]))
    if len(twice):
        i, j = turn[twice[0]], turn[twice[0] + 1]
        raise ValueError(f"{name}: items {i} and {j} are both at token {position[j]} of dp rank {owner[j]}")
