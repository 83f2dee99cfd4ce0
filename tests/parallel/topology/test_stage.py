"""Pipeline stages: every layer once, in order, and no cut is better."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.topology.stage import partition_layers, whole

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@given(COSTS, st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))
def test_the_costliest_stage_is_as_cheap_as_can_be(costs: list[int], n: int, before: int, after: int) -> None:
    n = min(n, len(costs))
    stages = partition_layers(costs, n, before=before, after=after)
    assert [k for s in stages for k in s.layers] == list(range(len(costs))) and all(s.layers for s in stages)
    assert [s.first for s in stages] == [True] + [False] * (n - 1)
    assert [s.last for s in stages] == [False] * (n - 1) + [True]

    def worst(cuts: tuple[int, ...]) -> int:
        loads = [sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs)))]
        loads[0] += before
        loads[-1] += after
        return max(loads)

    best = min(worst(cuts) for cuts in combinations(range(1, len(costs)), n - 1))
    assert worst(tuple(s.start for s in stages[1:])) == best


def test_more_stages_than_layers_are_refused_with_the_nearest() -> None:
    assert partition_layers([1.0, 1.0], 1) == (whole(2),)
    with pytest.raises(ValueError, match=r"4 pipeline stages for 3 layers.*Nearest: 3"):
        partition_layers([1.0] * 3, 4)
