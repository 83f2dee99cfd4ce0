"""One rank's plans of all micro-batches at once are those that it makes for each from whole maps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.boundary import (
    EdgePlan,
    ItemColumns,
    Joint,
    PlanCache,
    Stack,
    dest_side,
    on_stage,
    plan_edge,
    row_counts,
    row_positions,
    sharing,
    source_side,
    stack_positions,
)
from parallel.boundary.repeats import Repeats
from parallel.comm.transport import Message
from parallel.sequence.intervals import Column, Rows
from parallel.sequence.stream import alignment
from parallel.topology.layout import Layout, make_layout


def plain(rows: Rows) -> list[int]:
    return list(range(rows.start, rows.stop)) if isinstance(rows, slice) else [int(r) for r in rows]


def messages(found: tuple[Message, ...]) -> list[Any]:
    return [(m.peer, plain(m.rows)) for m in found]


def as_data(plan: EdgePlan) -> list[Any]:
    """All of a plan as plain lists."""
    return [
        (
            (t.rank, t.rows_in, t.rows_out, t.covered, t.moves),
            (plain(t.keep.source), plain(t.keep.dest), messages(t.sends), messages(t.recvs)),
            None if t.relay is None else (messages(t.relay.sends), messages(t.relay.recvs)),
        )
        for t in (plan.forward, *plan.backward)
    ] + [places_of(plan.repeats)]


def places_of(repeats: Repeats | None) -> list[list[list[int]]]:
    """Of rows that are read several times, the rounds of their further places."""
    return [] if repeats is None else [[plain(of), plain(to)] for _, of, to in repeats.rounds]


def random_layout(rng: random.Random, module: str, world: int, ranks: list[int]) -> Layout:
    """On these ranks. Mostly tp and dp: several readers of what several ranks hold."""
    degrees, size = {}, len(ranks)
    for name, some in (("tp", (1, 2, 2, 3, 4)), ("cp", (1, 1, 1, 1, 2, 3)), ("pp", (1, 1, 1, 2))):
        degrees[name] = rng.choice([d for d in some if size % d == 0])
        size //= degrees[name]
    return make_layout(module, world, {"ranks": ranks, **degrees, "sequence_parallel": rng.random() < 0.2})


def random_ranks(rng: random.Random, world: int) -> tuple[list[int], list[int]]:
    """Those of two modules: any, which may overlap, or two parts of the world."""
    line = rng.sample(range(world), world) if rng.random() < 0.4 else list(range(world))
    if rng.random() < 0.4:
        half = world // 2
        return line[:half], line[half:]
    sizes = [rng.choice([n for n in (2, 4, 6, 8, 12) if n <= world]) for _ in range(2)]
    return line[: sizes[0]], line[world - sizes[1] :]


def random_stack(seed: int, again: float = 0.0) -> tuple[Stack, int]:
    """again: the share of items that read the rows of an earlier one."""
    rng = random.Random(seed)
    world = rng.choice([2, 4, 8, 8, 12, 16])
    near = rng.random() < 0.3
    places = (list(range(world)),) * 2 if near else random_ranks(rng, world)
    source, dest = (
        random_layout(rng, m, world, ranks) for m, ranks in zip(("vision", "llm"), places, strict=True)
    )
    home = near and rng.random() < 0.5  # every item beside its sample: nothing moves where layouts are equal
    order = rng.choice(["contiguous", "zigzag"])
    unit = alignment(dest.cp, dest.token_shards, order)
    lines: list[tuple[int, int, int, int, int]] = []
    first: list[int] = []
    tokens = []
    for batch in range(rng.choice([1, 3, 6])):
        filled = [rng.randrange(3)] * dest.dp
        for _ in range(rng.choice([0, 1, 2, 3, 4, 6, 20])):
            d, rows = rng.randrange(dest.dp), rng.choice([0, 1, 2, 7, 30])
            s = d * source.dp // dest.dp if home else rng.randrange(source.dp)
            alike = [i for i, line in enumerate(lines) if line[0] == batch and line[3] == d]
            first.append(first[rng.choice(alike)] if alike and rng.random() < again else len(lines))
            if first[-1] < len(lines):
                _, rows, s, _, _ = lines[first[-1]]
            lines.append((batch, rows, s, d, filled[d]))
            filled[d] += rows + rng.choice([0, 1, 9])
        tokens.append([max(1, -(-n // unit)) * unit for n in filled])
    columns = np.asarray(lines, dtype=np.int64).reshape(-1, 5).T
    return Stack(
        source,
        dest,
        rng.randrange(dest.pp),
        ItemColumns(*columns, first=np.asarray(first, dtype=np.int64) if again else None),
        np.asarray(tokens),
        order,
        rng.choice([1, 1, 2, 4]),
    ), world


def sparse_stack(rng: random.Random) -> Stack:
    """Few items between modules apart, whose tp ranks hold and read equal rows: which rank sends what depends
    on readers and holders that this rank does not exchange rows with."""
    ends = [list(range(8)), list(range(8, 16))]
    rng.shuffle(ends)
    source = make_layout("vision", 16, {"ranks": ends[0], "tp": rng.choice([2, 4])})
    dest = make_layout("llm", 16, {"ranks": ends[1], "tp": rng.choice([1, 2, 2, 4])})
    lines, filled = [], np.zeros((6, dest.dp), dtype=np.int64)
    for batch in range(6):
        for _ in range(rng.choice([2, 3, 4, 6])):
            d, rows = rng.randrange(dest.dp), rng.choice([1, 2, 7, 30])
            lines.append((batch, rows, rng.randrange(source.dp), d, int(filled[batch, d])))
            filled[batch, d] += rows
    return Stack(source, dest, 0, ItemColumns(*np.asarray(lines).T), np.maximum(filled, 1), "contiguous")


def joint_of(stack: Stack, batch: int) -> Joint | None:
    """By dp rank of the encoder, what it computes at once with the items of a micro-batch."""
    if stack.at_once == 1:
        return None
    c, first = stack.items, batch // stack.at_once * stack.at_once
    own = np.ones(len(c.rows), dtype=bool) if c.first is None else c.first == np.arange(len(c.rows))

    def rows(stop: int) -> Column:
        some = own & (c.batch >= first) & (c.batch < stop)
        return np.bincount(c.source_dp[some], c.rows[some], stack.source.dp).astype(np.int64)

    return Joint(rows(batch), rows(first + stack.at_once))


def check(stack: Stack, ranks: Sequence[int], node_size: int | None, spares: float) -> None:
    """A stack's plans are plan_edge()'s of its maps, and its positions row_positions()."""
    c, bounds = stack.items, np.searchsorted(stack.items.batch, np.arange(stack.batches + 1)).tolist()
    maps = []
    for (a, b), tokens in zip(pairwise(bounds), stack.tokens, strict=True):
        own = np.arange(a, b) if c.first is None else np.flatnonzero(c.first[a:b] == np.arange(a, b)) + a
        first = None if c.first is None else c.first[a:b] - a
        source = source_side(stack.source, c.rows[own], c.source_dp[own], joint_of(stack, len(maps)))
        items = (c.rows[a:b], c.dest_dp[a:b], c.position[a:b])
        whole = dest_side(stack.dest, *items, tokens, order=stack.order)
        whole = whole if first is None else sharing(whole, c.rows[a:b], first)
        maps.append((source, on_stage(stack.dest, whole, stack.stage)))
    for rank in ranks:
        found = PlanCache(rank, node_size=node_size, spares=spares).plan_stack("edge", stack, row_shape=(4,))
        for one, (have, want) in zip(found, maps, strict=True):
            other = plan_edge("edge", have, want, rank, node_size=node_size, spares=spares, row_shape=(4,))
            assert as_data(one) == as_data(other), rank
            assert (one.name, one.row_shape) == (other.name, other.row_shape)
    for rank in {*ranks} & {*stack.dest.ranks}:
        positions = stack_positions(stack, rank)
        for k, (a, b) in enumerate(pairwise(bounds)):
            items = (c.rows[a:b], c.dest_dp[a:b], c.position[a:b], stack.tokens[k])
            assert np.array_equal(positions[k], row_positions(stack.dest, rank, *items, order=stack.order))
            counts, at = row_counts(stack.dest, *items, order=stack.order), stack.dest.coord(rank)
            assert counts[at.dp, at.cp, at.tp if stack.dest.token_shards > 1 else 0] == len(positions[k])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 100_000),
    node_size=st.sampled_from([None, 2, 3, 4]),
    spares=st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.6]),
)
def test_the_plans_of_a_stack_are_those_of_its_maps(seed: int, node_size: int | None, spares: float) -> None:
    stack, world = random_stack(seed)
    check(stack, random.Random(seed).sample(range(world), min(world, 3)), node_size, spares)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 100_000),
    node_size=st.sampled_from([None, 2, 3, 4]),
    spares=st.sampled_from([0.0, 0.25, 0.5]),
    again=st.sampled_from([0.2, 0.8]),
)
@example(seed=7, node_size=2, spares=0.4, again=0.8)  # only some of the maps take second hops
def test_so_they_are_where_items_are_read_several_times(
    seed: int, node_size: int | None, spares: float, again: float
) -> None:
    stack, world = random_stack(seed, again)
    check(stack, random.Random(seed).sample(range(world), min(world, 3)), node_size, spares)


def test_plans_depend_on_what_other_ranks_exchange() -> None:
    for seed in range(24):
        rng = random.Random(seed)
        node_size, spares = rng.choice([None, 2, 4, 8, 8]), rng.choice([0.0, 0.25, 0.5, 0.6])
        check(sparse_stack(rng), rng.sample(range(16), 2), node_size, spares)
