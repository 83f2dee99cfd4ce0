"""One rank's plans of all micro-batches at once are those that it makes for each from whole maps."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.boundary import (
    EdgePlan,
    ItemColumns,
    Stack,
    dest_side,
    on_stage,
    plan_edge,
    plan_stack,
    row_positions,
    source_side,
    stack_positions,
)
from parallel.comm.transport import Message
from parallel.sequence.intervals import Rows
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
    ]


def random_layout(rng: random.Random, module: str, world: int, *, near: bool) -> Layout:
    """On some of the ranks, in any order unless `near`."""
    size = world if near else rng.choice([n for n in (1, 2, 3, 4, 6, 8, 12) if n <= world])
    ranks = list(range(world)) if near else rng.sample(range(world), size)
    degrees = {}
    for name in ("tp", "cp", "pp"):
        degrees[name] = rng.choice([d for d in (1, 1, 2, 3, 4) if size % d == 0])
        size //= degrees[name]
    return make_layout(module, world, {"ranks": ranks, **degrees, "sequence_parallel": rng.random() < 0.5})


def random_stack(seed: int) -> tuple[Stack, int]:
    rng = random.Random(seed)
    world = rng.choice([1, 2, 4, 8, 12])
    near = rng.random() < 0.4
    source, dest = (random_layout(rng, m, world, near=near) for m in ("vision", "llm"))
    home = near and rng.random() < 0.5  # every item beside its sample: nothing moves where layouts are equal
    order = rng.choice(["contiguous", "zigzag"])
    unit = alignment(dest.cp, dest.token_shards, order)
    lines, tokens = [], []
    for batch in range(rng.choice([1, 2, 5])):
        filled = [rng.randrange(3)] * dest.dp
        for _ in range(rng.choice([0, 1, 5, 20])):
            d, rows = rng.randrange(dest.dp), rng.choice([0, 1, 2, 7, 30])
            s = d * source.dp // dest.dp if home else rng.randrange(source.dp)
            lines.append((batch, rows, s, d, filled[d]))
            filled[d] += rows + rng.choice([0, 1, 9])
        tokens.append([max(1, -(-n // unit)) * unit for n in filled])
    columns = np.asarray(lines, dtype=np.int64).reshape(-1, 5).T
    return Stack(
        source, dest, rng.randrange(dest.pp), ItemColumns(*columns), np.asarray(tokens), order
    ), world


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100_000))
def test_the_plans_of_a_stack_are_those_of_its_maps(seed: int) -> None:
    stack, world = random_stack(seed)
    c, bounds = stack.items, np.searchsorted(stack.items.batch, np.arange(stack.batches + 1)).tolist()
    maps = []
    for (a, b), tokens in zip(pairwise(bounds), stack.tokens, strict=True):
        source = source_side(stack.source, c.rows[a:b], c.source_dp[a:b])
        whole = dest_side(stack.dest, c.rows[a:b], c.dest_dp[a:b], c.position[a:b], tokens, order=stack.order)
        maps.append((source, on_stage(stack.dest, whole, stack.stage)))
    for node_size in (None, 1 + seed % 4):
        for rank in range(world):
            found = plan_stack("edge", stack, rank, node_size=node_size, row_shape=(4,))
            for one, (have, want) in zip(found, maps, strict=True):
                expected = plan_edge("edge", have, want, rank, node_size=node_size, row_shape=(4,))
                assert as_data(one) == as_data(expected), (rank, node_size)
                assert (one.name, one.row_shape) == (expected.name, expected.row_shape)
    for rank in stack.dest.ranks:
        positions = stack_positions(stack, rank)
        for k, (a, b) in enumerate(pairwise(bounds)):
            items = (c.rows[a:b], c.dest_dp[a:b], c.position[a:b], stack.tokens[k])
            assert np.array_equal(positions[k], row_positions(stack.dest, rank, *items, order=stack.order))
