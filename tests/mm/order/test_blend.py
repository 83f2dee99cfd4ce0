"""Blends keep every source in its quota, in any window, through changes of weights and ends of sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.order.blend import MOST, Blend, Period, whole_weights

WEIGHTS = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 10, 97, 300]), min_size=1, max_size=9).filter(any)


def counts(source: np.ndarray, sources: int) -> np.ndarray:
    """By number of positions and source, how often it is taken in them: [n + 1, sources]."""
    out = np.zeros((len(source) + 1, sources), dtype=np.int64)
    out[1:] = np.cumsum(source[:, None] == np.arange(sources), axis=0)
    return out


@given(WEIGHTS)
def test_every_source_is_in_its_quota_after_any_positions(weights: list[int]) -> None:
    total, w = sum(weights), np.asarray(weights)
    period = Period.of(weights)
    found, exact = counts(period.source, len(w)), np.arange(total + 1)[:, None] * w
    assert (found >= exact // total).all() and (found <= -(-exact // total)).all()
    assert np.array_equal(found[-1], w)
    for p in range(0, 3 * total, max(1, total // 5)):
        assert np.array_equal(period.taken(p), p // total * w + found[p % total])


@settings(max_examples=50)
@given(WEIGHTS, st.data())
def test_any_window_is_exact_to_less_than_two(weights: list[int], data: st.DataObject) -> None:
    blend, total = Blend.of({0: weights}, [None] * len(weights)), sum(weights)
    start = data.draw(st.integers(0, 10**12))
    length = data.draw(st.integers(0, 3 * total))
    source, nth = blend.at(start + np.arange(length))
    taken = np.bincount(source, minlength=len(weights))
    assert (abs(taken - np.asarray(weights) / total * length) < 2).all()
    assert np.array_equal(blend.taken(start + length) - blend.taken(start), taken)
    for k, before in enumerate(blend.taken(start).tolist()):  # takes of a source are counted one by one
        assert np.array_equal(nth[source == k], before + np.arange(taken[k]))


def step_by_step(
    weights: dict[int, Sequence[float]], most: Sequence[int | None], n: int
) -> tuple[list[int], bool]:
    """Takes of each source after n positions, by counting; whether the sources end before."""
    blend = Blend.of(weights, most)
    end = n if blend.end is None else min(n, blend.end)
    source, _ = blend.at(np.arange(end))
    return np.bincount(source, minlength=len(most)).tolist(), blend.end is not None and blend.end <= n


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 40))), min_size=1, max_size=5)
)
def test_a_source_ends_after_its_last_sample_and_the_others_share_its_part(
    sources: list[tuple[int, int | None]],
) -> None:
    weights, most = zip(*sources, strict=True)
    blend = Blend.of({0: weights}, most)
    finite = sum(n for n in most if n is not None)
    assert (blend.end == finite) if None not in most else (blend.end is None)
    n = 400 if blend.end is None else blend.end
    source, nth = blend.at(np.arange(n))
    for k, limit in enumerate(most):
        own = np.flatnonzero(source == k)
        assert np.array_equal(nth[own], np.arange(len(own)))
        assert limit is None or len(own) <= limit
        # While it lasts it has its share of what the sources that last have.
        for stretch in blend.stretches:
            w = stretch.weights
            assert sum(w) > 0 and (w[k] > 0) == (limit is None or stretch.before[k] < limit)


def test_weights_change_at_their_positions() -> None:
    blend = Blend.of({0: [1, 1, 0], 100: [0, 1, 3], 160: [1, 0, 0]}, [None] * 3)
    assert [blend.taken(p).tolist() for p in (0, 100, 160, 170)] == [
        [0, 0, 0],
        [50, 50, 0],
        [50, 65, 45],
        [60, 65, 45],
    ]
    assert step_by_step({0: [2, 1]}, [4, 1], 9) == ([4, 1], True)
    alone = Blend.of({0: [3.0]}, [None])
    assert [c.tolist() for c in alone.at(np.asarray([5, 10**15]))] == [[0, 0], [5, 10**15]]


def test_decimals_are_taken_at_their_word() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_weights([0.1] * 3) == [1, 1, 1]
    assert whole_weights([1e3, 2.5e3]) == [2, 5]
    given = [1234567, 7654321, 0, 333]
    found = np.asarray(whole_weights(given))
    assert found.sum() == MOST and found[2] == 0
    assert (abs(found / MOST - np.asarray(given) / sum(given)) < 1 / MOST).all()
    for wrong in ([0, 0.0], [1, -1], [10**9, 1]):
        with pytest.raises(ValueError, match="needed"):
            whole_weights(wrong)
