"""Random boundaries, and an independent account of what must move."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.boundary.rows import RowMap
from parallel.sequence.stream import Order, context_spans
from parallel.topology.layout import Layout, make_layout


@dataclass(frozen=True)
class Case:
    """Lanes as tuples of ranks; items with row counts; the runs each lane holds and wants."""

    world: int
    rows: int
    source: RowMap
    dest: RowMap


def random_case(
    seed: int, world: int | None = None, consumers: int = 1, holders: int = 1, *, again: bool = False
) -> Case:
    """Random tp x dp on both sides (colocated or not, any ratio), ragged and empty items, maybe sharded.

    consumers, holders: in how many lanes, at most, a row may be on either side. again: a lane may read one
    several times."""
    rng = random.Random(seed)
    world = world or rng.choice([1, 2, 3, 4, 6])
    src = random_lanes(rng, world)
    items = [rng.choice([0, 1, 2, 5, 9]) for _ in range(rng.choice([0, 1, 3, 8]))]
    source = RowMap.of_items(src, items, [rng.randrange(len(src)) for _ in items])
    total = sum(items)
    if holders > 1:
        more = [r for _ in range(holders) for r in _random_runs(rng, total, len(src))]
        deal = zip(source.start.tolist(), source.length.tolist(), source.lane.tolist(), strict=True)
        source = _of(src, _once_a_lane([*deal, *more]))
    dst = random_lanes(rng, world)
    runs = [r for _ in range(consumers) for r in _random_runs(rng, total, len(dst))]
    runs = runs if again else _once_a_lane(runs)
    rng.shuffle(runs)
    return Case(world, total, source, _of(dst, runs))


def _random_runs(rng: random.Random, total: int, lanes: int) -> list[tuple[int, int, int]]:
    runs, at = [], 0
    while at < total:
        n = min(total - at, rng.choice([1, 2, 3, 7]))
        runs.append((at, n, rng.randrange(lanes)))
        at += n
    return runs


def _of(lanes: list[tuple[int, ...]], runs: list[tuple[int, int, int]]) -> RowMap:
    return RowMap.of_runs(lanes, [r[0] for r in runs], [r[1] for r in runs], [r[2] for r in runs])


def random_lanes(rng: random.Random, world: int) -> list[tuple[int, ...]]:
    ranks = rng.sample(range(world), rng.randint(1, world))
    tp = rng.choice([d for d in range(1, len(ranks) + 1) if len(ranks) % d == 0])
    return [tuple(ranks[i : i + tp]) for i in range(0, len(ranks), tp)]


def random_spec(rng: random.Random, size: int, world: int) -> dict[str, Any]:
    """Any degrees that fit `size` ranks, which are any of `world` in any order, with and without sequence
    parallelism."""
    degrees = {}
    left = size
    for axis in rng.sample(["tp", "cp", "pp"], 3):
        degrees[axis] = rng.choice([d for d in range(1, left + 1) if left % d == 0])
        left //= degrees[axis]
    ranks = rng.sample(range(world), size)
    return {"ranks": ranks, "sequence_parallel": rng.random() < 0.5, **degrees}


def random_layout(rng: random.Random, size: int, module: str) -> Layout:
    return make_layout(module, size, random_spec(rng, size, size))


def _once_a_lane(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Drop runs that would give a lane the same row twice."""
    seen: set[tuple[int, int]] = set()
    out = []
    for start, n, lane in runs:
        cells = {(lane, r) for r in range(start, start + n)}
        if not cells & seen:
            seen |= cells
            out.append((start, n, lane))
    return out


def rows_of(side: RowMap, rank: int) -> list[int]:
    """Global row of each local row of a rank, in local order."""
    for lane, members in enumerate(side.lanes):
        if rank in members:
            table = [0] * int(side.rows[lane])
            for s, n, ln, at in zip(side.start, side.length, side.lane, side.local, strict=True):
                if ln == lane:
                    table[at : at + n] = range(s, s + n)
            for ln, of, to, n in zip(*side.copies, strict=True) if side.copies else ():
                if ln == lane:
                    table[to : to + n] = table[of : of + n]
            return table
    return []


def least_rows(have: RowMap, want: RowMap, world: int) -> int:
    """Information minimum: rows that ranks want, someone has, and they do not have themselves."""
    anyone = {row for r in range(world) for row in rows_of(have, r)}
    return sum(len((set(rows_of(want, r)) & anyone) - set(rows_of(have, r))) for r in range(world))


def least_crossings(have: RowMap, want: RowMap, world: int, node_size: int) -> int:
    """Rows that must come from other nodes: those that ranks of a node want and none of them has, once."""
    held = [set(rows_of(have, r)) for r in range(world)]
    wanted = [set(rows_of(want, r)) for r in range(world)]
    anyone = set().union(*held)
    nodes = [range(low, min(low + node_size, world)) for low in range(0, world, node_size)]
    return sum(
        len((set().union(*(wanted[r] for r in node)) & anyone) - set().union(*(held[r] for r in node)))
        for node in nodes
    )


def least_gradient_rows(source: RowMap, dest: RowMap, world: int) -> int:
    """Gradient rows that must travel: for each source rank and row, one from every lane that consumed the
    row, unless the rank is in that lane itself."""
    consumed = [set(rows_of(dest, members[0])) for members in dest.lanes]
    return sum(
        row in rows and rank not in dest.lanes[lane]
        for rank in range(world)
        for row in rows_of(source, rank)
        for lane, rows in enumerate(consumed)
    )


def _shares(rows: list[int], parts: int) -> list[list[int]]:
    """Contiguous shares of a list, by the formula that the docs give."""
    n = len(rows)
    return [rows[k * n // parts : (k + 1) * n // parts] for k in range(parts)]


def held_rows(layout: Layout, rows: list[int], item_dp: list[int]) -> dict[int, list[int]]:
    """Global rows of each rank, split row by row."""
    first = np.cumsum([0, *rows])
    held: dict[int, list[int]] = {r: [] for r in layout.ranks}
    for dp in range(layout.dp):
        stream = [r for i, d in enumerate(item_dp) if d == dp for r in range(first[i], first[i] + rows[i])]
        for cp, share in enumerate(_shares(stream, layout.cp)):
            parts = _shares(share, layout.tp) if layout.sequence_parallel else [share] * layout.tp
            for tp, part in enumerate(parts):
                held[layout.rank_at(tp=tp, cp=cp, dp=dp, pp=layout.pp - 1)] = part
    return held


def local_tokens(layout: Layout, tokens: list[int], order: Order) -> dict[int, list[int]]:
    """Token positions of each rank of stage 0, in its local order."""
    held = {}
    for dp, n in enumerate(tokens):
        for cp, spans in enumerate(context_spans(n, layout.cp, order)):
            local = [t for a, b in spans for t in range(a, b)]
            parts = _shares(local, layout.tp) if layout.sequence_parallel else [local] * layout.tp
            for tp, part in enumerate(parts):
                held[layout.rank_at(tp=tp, cp=cp, dp=dp)] = part
    return held
