"""Rows that a lane reads several times are sent once, and their gradients come back as one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.boundary import sharing
from parallel.boundary.plan import plan_edge
from parallel.boundary.rows import RowMap
from parallel.sequence.intervals import Column
from tests.parallel.boundary.cases import random_case, rows_of
from tests.parallel.boundary.test_plan import check


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), consumers=st.integers(2, 4), node_size=st.sampled_from([None, 2, 4]))
def test_a_row_that_a_lane_reads_several_times_is_sent_once(
    seed: int, consumers: int, node_size: int | None
) -> None:
    check(random_case(seed, consumers=consumers, holders=seed % 2 + 1, again=True), node_size)


@given(
    runs=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 2), st.integers(0, 3)), max_size=9
    )
)
def test_a_map_holds_what_its_runs_say(runs: list[tuple[int, int, int, int]]) -> None:
    """Rows again and again in a lane, in any order, with gaps between the local rows."""
    local, tables = [], [[0] * 99 for _ in range(3)]
    reach = [0, 0, 0]
    for start, n, lane, gap in runs:
        local.append(reach[lane] + gap)
        reach[lane] += gap + n
        tables[lane][local[-1] : reach[lane]] = range(start, start + n)
    columns = (list(c) for c in zip(*runs, strict=True)) if runs else ([], [], [], [])
    start, length, lane, _ = columns
    m = RowMap.of_runs([(0,), (5, 7), (2,)], start, length, lane, local, [99] * 3)
    assert [rows_of(m, r) for r in (0, 5, 2)] == tables
    cells = list(zip(np.repeat(m.lane, m.length), indices(m.start, m.length), strict=True))
    assert len(set(cells)) == len(cells), "once in the runs of a lane"


def indices(start: Column, length: Column) -> list[int]:
    return [r for s, n in zip(start.tolist(), length.tolist(), strict=True) for r in range(s, s + n)]


def test_a_row_that_a_source_holds_twice_is_refused() -> None:
    source = RowMap.of_runs([(3,)], [0, 1], [2, 2], [0, 0])
    with pytest.raises(
        ValueError, match=r"edge e: ranks \(3,\) hold a row twice, the second time as local row 2"
    ):
        plan_edge("e", source, RowMap.of_items([(3,)], [2], [0]), 3)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ([0], "row counts of 3 items, but whose rows they read of 1"),
        ([0, 2, 2], "item 1, of 2 rows, reads those of item 2; needed: an item that has rows of its own"),
        ([0, 0, 1], "item 2, of 3 rows, reads those of item 1"),
        ([0, 0, 3], "item 2, of 3 rows, reads those of item 3"),
    ],
)
def test_items_that_cannot_share_rows_are_refused(first: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sharing(RowMap.of_items([(0,)], [2, 2, 3], [0, 0, 0]), [2, 2, 3], first)
