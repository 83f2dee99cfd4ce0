"""Streams take every sample of a source once an epoch, and bad samples move no others."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.errors import DataError
from mm.order.chosen import Chosen, Range
from mm.order.stream import Source, Stream
from mm.plan.batches import Batches


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9), n=st.integers(1, 40), batch=st.integers(1, 17))
def test_every_epoch_takes_every_sample_once(seed: int, n: int, batch: int) -> None:
    batches = Batches(Stream.whole(seed, n), batch)
    stream = [i for step in range(3 * n) for i in batches.ids(step).tolist()]
    for epoch in range(len(stream) // n):
        assert Counter(stream[epoch * n : (epoch + 1) * n]) == Counter(range(n))


def test_epochs_differ_and_so_do_seeds_and_sources() -> None:
    n, whole = 500, Chosen.of([Range(0, 500)])
    streams = [Stream.of(seed, [Source(name, whole)]) for seed in (0, 1) for name in "ab"]
    found = [s.at(epoch * n + np.arange(n))[0] for s in streams for epoch in (0, 1, 10**6)]
    assert all((a == b).sum() < 8 for k, a in enumerate(found) for b in found[:k])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9), n=st.integers(2, 40), data=st.data())
def test_a_bad_sample_moves_no_other(seed: int, n: int, data: st.DataObject) -> None:
    bad = frozenset(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    more = bad | frozenset(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    batches = Batches(Stream.whole(seed, n), 7)
    for step in range(5):
        clean, mended = batches.ids(step), batches.ids(step, bad)
        assert not bad & set(mended.tolist())
        assert all(a == b for a, b in zip(clean.tolist(), mended.tolist(), strict=True) if a not in bad)
        if len(more) < n:  # what came in the place of a bad sample stays when others are found
            later = batches.ids(step, more).tolist()
            assert all(a == b for a, b in zip(mended.tolist(), later, strict=True) if a not in more)


def test_a_bad_sample_is_replaced_by_any_other_of_its_source() -> None:
    sources = [Source("a", Chosen.of([Range(0, 50)])), Source("b", Chosen.of([Range(50, 50)]))]
    batches = Batches(Stream.of(0, sources, {0: [1, 1]}), 100)
    bad = frozenset(range(0, 100, 2))
    found = np.concatenate([batches.ids(step, bad) for step in range(40)])
    assert (np.bincount(found // 50) == 2000).all()
    drawn = np.bincount(found, minlength=100)[1::2]
    assert drawn.min() > 40 and drawn.max() < 130  # 40 once an epoch, and 40 in the places of others


def test_all_samples_bad_ends() -> None:
    with pytest.raises(DataError, match="all 3 samples are"):
        Batches(Stream.whole(0, 3), 2).ids(0, range(3))
    sources = [Source("a", Chosen.of([Range(0, 9)])), Source("b", Chosen.of([Range(9, 1)]))]
    batches = Batches(Stream.of(0, sources, {0: [1, 1]}), 4)
    with pytest.raises(DataError, match="all 1 samples of source b are"):
        batches.ids(0, [9])
    assert set(batches.ids(3, range(8)).tolist()) == {8, 9}  # one good sample is found however rare it is


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2000), st.booleans()), min_size=1, max_size=4))
def test_chosen_samples_are_those_of_their_bits(parts: list[tuple[int, int, bool]]) -> None:
    rng, at, ranges, expected = np.random.default_rng(0), 0, [], []
    for gap, size, some in parts:
        keep = rng.random(size) < (0.3 if some else 2)
        ranges.append(Range(at + gap, size, np.packbits(keep) if some else None))
        expected += (at + gap + np.flatnonzero(keep)).tolist()
        at += gap + size
    chosen = Chosen.of(ranges)
    assert len(chosen) == len(expected)
    assert chosen.ids(np.arange(len(chosen))).tolist() == expected
