"""Both sides of an edge, against lists of single rows and tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.boundary import Joint, dest_side, joint_streams, row_positions, source_side
from parallel.sequence.stream import Order, alignment
from parallel.topology.layout import make_layout
from tests.parallel.boundary.cases import held_rows, local_tokens, random_layout, rows_of


@given(seed=st.integers(0, 2**32))
def test_the_source_holds_its_items_end_to_end(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, rng.choice([1, 2, 3, 4, 6, 12]), "vision")
    rows = [rng.choice([0, 1, 3, 8]) for _ in range(rng.choice([0, 1, 7]))]
    lane = [rng.randrange(layout.dp) for _ in rows]
    side = source_side(layout, rows, lane)
    side.check()
    assert {r: rows_of(side, r) for r in layout.ranks} == held_rows(layout, rows, lane)
    if not layout.sequence_parallel:
        assert {len(ranks) for ranks in side.lanes} == {layout.tp}, "replicas share a lane"


@given(seed=st.integers(0, 2**32))
def test_micro_batches_that_are_computed_at_once_are_split_together(seed: int) -> None:
    """What a rank has of all of them, end to end, is its share of all rows."""
    rng = random.Random(seed)
    layout = random_layout(rng, rng.choice([1, 2, 4, 6, 12]), "vision")
    at_once, n = rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    dealt = [
        [(rng.choice([0, 1, 3, 8]), rng.randrange(layout.dp)) for _ in range(rng.choice([0, 1, 4]))]
        for _ in range(n)
    ]
    total = [[sum(r for r, d in items if d == dp) for dp in range(layout.dp)] for items in dealt]
    joint = joint_streams(np.asarray(total).reshape(-1), layout.dp, at_once)
    for first in range(0, n, at_once):
        group = [item for items in dealt[first : first + at_once] for item in items]
        held: dict[int, list[int]] = {rank: [] for rank in layout.ranks}
        ahead = 0
        for k in range(first, min(n, first + at_once)):
            part = slice(k * layout.dp, (k + 1) * layout.dp)
            rows, dp = [r for r, _ in dealt[k]], [d for _, d in dealt[k]]
            side = source_side(layout, rows, dp, Joint(joint.before[part], joint.total[part]))
            side.check()
            for rank in layout.ranks:
                held[rank] += [ahead + row for row in rows_of(side, rank)]
            ahead += sum(rows)
        assert held == held_rows(layout, [r for r, _ in group], [d for _, d in group])


@given(seed=st.integers(0, 2**32), order=st.sampled_from(["contiguous", "zigzag"]))
def test_the_destination_reads_rows_where_their_tokens_are(seed: int, order: Order) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, rng.choice([1, 2, 3, 4, 6, 12]), "llm")
    unit = alignment(layout.cp, layout.tp, order)
    tokens = [unit * rng.choice([0, 1, 4]) for _ in range(layout.dp)]
    items, at = [], [0] * layout.dp
    for _ in range(rng.choice([0, 1, 9])):
        dp = rng.randrange(layout.dp)
        gap, n = rng.choice([0, 0, 1, 5]), rng.choice([0, 1, 3, 8])
        if at[dp] + gap + n <= tokens[dp]:
            items.append((n, dp, at[dp] + gap))
            at[dp] += gap + n
    rng.shuffle(items)  # the order of the rows is not that of the tokens
    rows, lane, position = ([item[k] for item in items] for k in range(3))
    row_at: list[dict[int, int]] = [{} for _ in tokens]  # global row at a token
    for i, (n, dp, first) in enumerate(items):
        row_at[dp] |= {first + k: sum(rows[:i]) + k for k in range(n)}
    stages = sorted(rng.sample(range(layout.pp), rng.randint(1, layout.pp)))
    side = dest_side(layout, rows, lane, position, tokens, order=order, stages=stages)
    side.check()
    for rank, held in local_tokens(layout, tokens, order).items():
        coord = layout.coord(rank)
        positions = [k for k, t in enumerate(held) if t in row_at[coord.dp]]
        for pp in range(layout.pp):
            same = layout.rank_at(tp=coord.tp, cp=coord.cp, dp=coord.dp, pp=pp)
            wanted = [row_at[coord.dp][held[k]] for k in positions] if pp in stages else []
            assert rows_of(side, same) == wanted
            found = row_positions(layout, same, rows, lane, position, tokens, order=order)
            assert found.dtype == np.int64 and found.tolist() == positions


LLM = make_layout("llm", 4, {"tp": 2, "sequence_parallel": True})  # tp2 dp2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: source_side(LLM, [1, 2], [0]), "llm: row counts of 2 items, but dp ranks of 1"),
        (lambda: source_side(LLM, [1, -2], [0, 1]), "item 1 has -2 rows"),
        (lambda: source_side(LLM, [1], [2]), "item 0 is on dp rank 2; there are 0-1"),
        (lambda: dest_side(LLM, [1], [0], [], [4, 4]), "1 items at 0 positions in 2 streams"),
        (lambda: dest_side(LLM, [1], [0], [0], [4]), "1 items at 1 positions in 1 streams"),
        (lambda: dest_side(LLM, [1], [0], [0], [4, 5]), "dp rank 1 is 5 .* a multiple of 2; nearest: 6"),
        (lambda: dest_side(LLM, [3], [1], [2], [8, 4]), "item 0 is at tokens 2-4 of dp rank 1, .* 4 tokens"),
        (lambda: dest_side(LLM, [3, 3], [1, 1], [3, 1], [8, 8]), "items 1 and 0 are both at token 3"),
        (lambda: dest_side(LLM, [3], [1], [0], [4, 4], stages=(1,)), r"stages \[1\] of 0-0"),
        (lambda: row_positions(LLM, 0, [1], [0], [0], [4, 5]), "dp rank 1 is 5 tokens long"),
    ],
)
def test_sides_that_cannot_be_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
