"""The longest-processing-time rule, for many problems at once, is the rule applied one load at a time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.sequence import dealing
from parallel.sequence.dealing import loads, longest_first

COSTS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.5, 7.0, 50.0]), max_size=40)


def by_hand(costs: list[float], load: list[float]) -> tuple[list[int], list[float]]:
    load, out = list(load), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        out[i] = load.index(min(load))
        load[out[i]] += costs[i]
    return out, load


@pytest.mark.parametrize("round_cost", [0, 10**9], ids=["rounds", "heap"])
@given(st.lists(COSTS, min_size=1, max_size=4), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_each_load_goes_to_the_least_bin(
    round_cost: int, problems: list[list[float]], bins: int, begun: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 8, (len(problems), bins)) / 2 if begun else np.zeros((len(problems), bins))
    lines = [(p, cost) for p, costs in enumerate(problems) for cost in costs]
    mixed = rng.permutation(len(lines))
    problem = np.asarray([lines[i][0] for i in mixed], dtype=np.int64)
    cost = np.asarray([lines[i][1] for i in mixed], dtype=np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealing, "ROUND", round_cost)
        found = longest_first(cost, problem, load)
    for p in range(len(problems)):
        bin_of, after = by_hand(cost[problem == p].tolist(), load[p].tolist())
        assert found.bin[problem == p].tolist() == bin_of
        assert found.load[p].tolist() == after


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_the_fullest_bin_is_within_four_thirds_of_the_best(costs: list[int], bins: int) -> None:
    """The best of all dealings, by trying them all."""
    found = longest_first(np.asarray(costs, float), np.zeros(len(costs), np.int64), np.zeros((1, bins)))
    best = min(
        loads(np.asarray(costs, float), np.asarray(each), bins).max()
        for each in itertools.product(range(bins), repeat=len(costs))
    )
    assert found.load.max() <= best * (4 / 3 - 1 / (3 * bins)) + 1e-9
