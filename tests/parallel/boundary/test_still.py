"""Where no row moves, plans that follow from a rank's items alone are those that whole maps give."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.boundary import ItemColumns, Stack
from parallel.boundary.still import partners
from parallel.topology.layout import make_layout
from tests.parallel.boundary.test_stack import check


def still_stack(rng: random.Random, moved: bool) -> Stack:
    """Modules on the same ranks, which stand in any order; items on the ranks that read them, in any order in
    their streams. moved: then one item of the last micro-batch may be elsewhere."""
    world, tp, pp = 8, rng.choice([1, 2]), rng.choice([1, 2])
    line = list(range(world))
    of = {}
    for name in ("vision", "llm"):
        blocks = [line[k : k + tp] for k in range(0, world, tp)]
        for block in blocks:
            rng.shuffle(block)
        stages = [blocks[k::pp] for k in range(pp)]
        for stage in stages:
            rng.shuffle(stage)
        ranks = [r for stage in stages for block in stage for r in block]
        of[name] = make_layout(name, world, {"ranks": ranks, "tp": tp, "pp": pp})
    source, dest = of["vision"], of["llm"]
    partner = partners(source, dest, pp - 1)
    assert partner is not None and (partner >= 0).all()
    lines, tokens = [], []
    for batch in range(rng.choice([1, 3])):
        filled, own = np.zeros(dest.dp, dtype=np.int64), []
        for _ in range(rng.choice([0, 1, 4, 12])):
            d, rows = rng.randrange(dest.dp), rng.choice([0, 1, 2, 7])
            filled[d] += rng.choice([0, 1, 9])
            own.append((batch, rows, int(partner[d]), d, int(filled[d])))
            filled[d] += rows
        lines += rng.sample(own, len(own)) if rng.random() < 0.5 else own
        tokens.append(np.maximum(filled, 1))
    if moved and lines:
        batch, rows, _, *rest = lines[-1]
        lines[-1] = (batch, rows, rng.randrange(source.dp), *rest)
    columns = np.asarray(lines, dtype=np.int64).reshape(-1, 5).T
    stage = rng.choice([pp - 1, pp - 1, 0])
    return Stack(source, dest, stage, ItemColumns(*columns), np.asarray(tokens), "zigzag", rng.choice([1, 2]))


@settings(max_examples=40)
@given(seed=st.integers(0, 100_000), node_size=st.sampled_from([None, 2]), moved=st.booleans())
def test_plans_without_transfers_are_those_of_whole_maps(
    seed: int, node_size: int | None, moved: bool
) -> None:
    rng = random.Random(seed)
    check(still_stack(rng, moved), rng.sample(range(8), 3), node_size, 0.5)


def test_streams_that_ranks_split_or_do_not_share_have_no_partners() -> None:
    whole = make_layout("llm", 4, {"ranks": [3, 2, 1, 0], "tp": 2})
    assert partners(make_layout("vision", 4, {"ranks": [0, 1, 2, 3], "tp": 2}), whole, 0).tolist() == [1, 0]
    assert partners(make_layout("vision", 4, {"ranks": [0, 2, 1, 3], "tp": 2}), whole, 0).tolist() == [-1, -1]
    for options in ({"tp": 1}, {"cp": 2}, {"tp": 2, "sequence_parallel": True}):
        assert partners(make_layout("vision", 4, {"ranks": [0, 1, 2, 3], **options}), whole, 0) is None
