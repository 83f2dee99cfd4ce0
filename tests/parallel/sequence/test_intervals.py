"""Intervals against sets of whole numbers, in both forms."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from parallel.sequence.intervals import (
    Span,
    before,
    column,
    count,
    disjoint,
    join,
    meet,
    numbers,
    outside,
    overlap,
    repeat_groups,
    rows_of,
    share_start,
    shares,
    size,
    sums,
    union,
)

spans = st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1]))
any_spans = st.lists(spans, max_size=6)


@st.composite
def stretches(draw: st.DrawFn) -> list[Span]:
    """Disjoint and ascending; they may touch or be empty."""
    edges = sorted(draw(st.lists(st.integers(0, 30), max_size=10)))
    return list(zip(edges[::2], edges[1::2], strict=False))


def members(of: list[Span]) -> set[int]:
    return {n for span in of for n in range(*span)}


def columns(of: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(of, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@given(any_spans)
def test_joined_spans_are_disjoint_and_have_the_same_numbers(some: list[Span]) -> None:
    joined = join(some)
    assert members(joined) == members(some) and size(joined) == len(members(some))
    edges = [edge for span in joined for edge in span]
    assert edges == sorted(set(edges)), "empty, touching or out of order"
    start, stop = union(*columns(some))
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == joined


@given(stretches(), stretches(), st.randoms(use_true_random=False))
def test_what_is_shared_is_in_both(a: list[Span], b: list[Span], random: Random) -> None:
    shared = overlap(random.sample(a, len(a)), random.sample(b, len(b)))
    assert members(shared) == members(a) & members(b) and size(shared) == len(members(shared))
    assert numbers(shared).tolist() == sorted(members(shared))


@given(any_spans, stretches())
def test_every_interval_is_what_it_shares_with_others_and_what_it_does_not(
    some: list[Span], others: list[Span]
) -> None:
    both = meet(*columns(some), *columns(others))
    alone = outside(*columns(some), *columns(others))
    for i, span in enumerate(some):
        shared = [(int(a), int(b)) for k, _, a, b in zip(*both, strict=True) if k == i]
        left = [(int(a), int(b)) for k, a, b in zip(*alone, strict=True) if k == i]
        assert members(shared) == members([span]) & members(others) and size(shared) == len(members(shared))
        assert members(left) == members([span]) - members(others) and size(left) == len(members(left))
        assert shared == sorted(shared) and left == sorted(left)
    for i, k, a, b in zip(*both, strict=True):
        assert some[i][0] <= a < b <= some[i][1] and others[k][0] <= a < b <= others[k][1]
    assert np.all(np.diff(both[0]) >= 0) and np.all(np.diff(alone[0]) >= 0)


@given(any_spans)
def test_spans_are_disjoint_where_their_numbers_ascend(some: list[Span]) -> None:
    listed = [n for span in some for n in range(*span)]
    assert disjoint(some) == (listed == sorted(set(listed)))


@given(st.integers(0, 100), st.integers(1, 20), st.integers(0, 9))
def test_shares_are_contiguous_whole_and_even(n: int, parts: int, start: int) -> None:
    split = shares(n, parts, start)
    assert len(split) == parts and split[0][0] == start and split[-1][1] == start + n
    assert all(a[1] == b[0] for a, b in pairwise(split))
    assert max(b - a for a, b in split) - min(b - a for a, b in split) <= 1
    begins = share_start(np.asarray([n, 2 * n]), parts, np.arange(parts)[:, None])
    assert begins.tolist() == [[share_start(n, parts, k), share_start(2 * n, parts, k)] for k in range(parts)]


@given(any_spans)
def test_rows_are_a_slice_where_they_are_consecutive(some: list[Span]) -> None:
    start, stop = columns(some)
    rows, expected = rows_of(start, stop - start), numbers(some)
    assert count(rows) == len(expected)
    assert np.arange(40)[rows].tolist() == expected.tolist()
    if some and all(a[1] == b[0] for a, b in pairwise(some)):
        assert isinstance(rows, slice)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
def test_groups_and_sums(pairs: list[tuple[int, int]]) -> None:
    first, length = (column([pair[k] for pair in pairs]) for k in (0, 1))
    k, value = repeat_groups(first, length)
    expected = [(i, a + j) for i, (a, n) in enumerate(pairs) for j in range(n)]
    assert list(zip(k.tolist(), value.tolist(), strict=True)) == expected
    assert before(length).tolist() == [sum(n for _, n in pairs[:i]) for i in range(len(pairs))]
    assert sums(length, first, 10).tolist() == [sum(n for a, n in pairs if a == g) for g in range(10)]
