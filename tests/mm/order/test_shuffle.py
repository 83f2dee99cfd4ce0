"""The shuffle is a permutation of any number of things, and as well mixed as numpy's."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.order.shuffle import key_of, keyed, shuffled


def shuffle(seed: int, epoch: int, n: int) -> np.ndarray:
    return shuffled(keyed(key_of(seed, "a"), np.full(n, epoch)), n, np.arange(n))


@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9), n=st.integers(1, 3000))
def test_it_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert np.array_equal(np.sort(shuffle(seed, epoch, n)), np.arange(n))


@pytest.mark.parametrize("n", [10**6 + 3, 2**40 + 11])
def test_entries_of_a_large_one_are_distinct(n: int) -> None:
    """Any few of them are found alone, in the same places."""
    index = np.random.default_rng(0).choice(min(n, 2**32), 20_000, replace=False)
    keys = keyed(7, np.zeros(len(index)))
    found = shuffled(keys, n, index)
    assert len(np.unique(found)) == len(index) and found.min() >= 0 and found.max() < n
    assert np.array_equal(shuffled(keys[:9], n, index[500:509]), found[500:509])


def chi2(counts: np.ndarray) -> float:
    """Chi squared of equal shares, over its degrees of freedom: 1 on average."""
    mean = counts.mean()
    return float(((counts - mean) ** 2 / mean).sum() / (counts.size - 1))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_come_equally_often(n: int) -> None:
    keys = keyed(11, np.arange(60_000))
    columns = [shuffled(keys, n, np.full(len(keys), k)) for k in range(n)]
    code = sum(c * n**k for k, c in enumerate(columns))
    every = [sum(v * n**k for k, v in enumerate(p)) for p in permutations(range(n))]
    # Five standard deviations of chi squared over its degrees of freedom.
    bound = 1 + 5 * (2 / (len(every) - 1)) ** 0.5
    assert chi2(np.asarray([(code == e).sum() for e in every])) < bound


def statistics(p: np.ndarray) -> list[float]:
    """Where things go by where they come from, steps between neighbours, ascents, and fixed points."""
    n, cells = len(p), 16
    at = np.arange(n) * cells // n * cells + p * cells // n
    step = (np.diff(p) % n) * 64 // n
    lows = np.bincount((p[:-1] & 7) * 8 + (p[1:] & 7), minlength=64)
    ascents = abs((np.diff(p) > 0).sum() - n / 2) / (n / 12) ** 0.5
    fixed = float((p == np.arange(n)).sum())
    return [chi2(np.bincount(at, minlength=256)), chi2(np.bincount(step)), chi2(lows), ascents, fixed]


@pytest.mark.parametrize("n", [1000, 4097, 65_536])
def test_it_is_as_well_mixed_as_numpys(n: int) -> None:
    ours = np.mean([statistics(shuffle(3, epoch, n)) for epoch in range(24)], axis=0)
    theirs = np.asarray([statistics(np.random.default_rng(epoch).permutation(n)) for epoch in range(24)])
    error = theirs.std(axis=0) / 24**0.5
    assert (abs(ours - theirs.mean(axis=0)) < 5 * error * 2**0.5).all(), (ours, theirs.mean(axis=0))


def test_orders_of_epochs_and_seeds_are_unlike() -> None:
    """Neighbouring keys give orders that agree no more often than chance has it."""
    n = 5000
    found = [shuffle(seed, epoch, n) for seed in range(3) for epoch in range(3)]
    same = [int((a == b).sum()) for a, b in pairwise(found)]
    assert max(same) < 8 and abs(np.corrcoef(found)[np.triu_indices(9, 1)]).max() < 5 / n**0.5
