"""How the rows of a dp rank are split, and which rows of their items a part of them sees. Pure."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.share import Share, encoder_row_spans, pieces, reach
from parallel.boundary import source_side
from parallel.topology.axis import Axes, Axis
from parallel.topology.layout import make_layout

LENGTHS = st.lists(st.integers(0, 9), max_size=6)
DEGREES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.booleans())


@given(LENGTHS, DEGREES)
def test_rows_are_split_evenly_and_completely(rows: list[int], degrees: tuple[int, int, bool]) -> None:
    cp, tp, sp = degrees
    spans = encoder_row_spans(rows, cp, tp, sp)
    assert len(spans) == cp and all(len(parts) == tp for parts in spans)
    flat = [span for parts in spans for span in (parts if sp else parts[:1])]
    assert flat[0][0] == 0 and flat[-1][1] == sum(rows)
    assert all(a[1] == b[0] for a, b in pairwise(flat))
    assert max(parts[-1][1] - parts[0][0] for parts in spans) <= math.ceil(sum(rows) / cp)
    for parts in spans:
        sizes = [b - a for a, b in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sp or len(set(parts)) == 1


@settings(max_examples=40)
@given(LENGTHS, DEGREES)
def test_the_boundary_splits_rows_in_the_same_way(rows: list[int], degrees: tuple[int, int, bool]) -> None:
    cp, tp, sp = degrees
    layout = make_layout("vision", cp * tp, {"cp": cp, "tp": tp, "sequence_parallel": sp})
    side = source_side(layout, rows, [0] * len(rows))
    spans = encoder_row_spans(rows, cp, tp, sp)
    for c in range(cp):
        for t in range(tp):
            a, b = spans[c][t]
            lane = side.lane_of(layout.rank_at(cp=c, tp=t))
            mine = [k for k in range(len(side.start)) if side.lane[k] == lane and side.length[k]]
            assert sum(int(side.length[k]) for k in mine) == b - a == side.rows[lane]
            assert all(side.start[k] - side.local[k] == a for k in mine)


@given(LENGTHS, st.integers(0, 60), st.integers(0, 60))
def test_pieces_are_the_rows_of_a_span(lengths: list[int], a: int, b: int) -> None:
    rows = [(i, k) for i, n in enumerate(lengths) for k in range(n)]
    span = (min(a, len(rows)), min(b, len(rows)))
    found = [(p.item, k) for p in pieces(lengths, span) for k in range(p.start, p.stop)]
    assert found == rows[slice(*span)]


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 0, 1, 4, 15]))
def test_reach_is_what_a_span_sees_and_no_more(lengths: list[int], cp: int, n: int | None) -> None:
    item = [i for i, length in enumerate(lengths) for _ in range(length)]
    far = len(item) if n is None else n
    for (a, b), *_ in encoder_row_spans(lengths, cp):
        near = [
            r for r in range(len(item)) if any(item[r] == item[o] and abs(r - o) <= far for o in range(a, b))
        ]
        low, high = reach(lengths, (a, b), n)
        assert list(range(low, high)) == near


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_prefixes_are_where_the_first_rows_are(rows: list[int], cp: int, tp: int, prefix: int) -> None:
    """Token by token: each prefix token is on the rank of its item's first row."""
    unit, group = 2, cast(dist.ProcessGroup, object())  # nothing is sent
    numbered = [(i, r) for i, n in enumerate(rows) for r in range(n)]
    spans = encoder_row_spans(rows, cp, tp, True)
    for c in range(cp):
        for t in range(tp):
            axes = Axes(cp=Axis("cp", cp, c, group), tp=Axis("tp", tp, t, group), sequence_parallel=tp > 1)
            share = Share.of(rows, axes, unit, prefix)
            a, b = spans[c][t]
            mine = sum(unit + prefix * (r == 0) for _, r in numbered[a:b])
            before = sum(unit + prefix * (r == 0) for _, r in numbered[:a])
            assert share.part == (before, before + mine)
            assert share.lengths == tuple(unit * n + prefix for n in rows)
