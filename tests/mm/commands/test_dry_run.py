"""A dry run for people: ranks that are alike in a row, and numbers in units that suit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.commands.dry_run import ROWS, rank_table
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.report.units import bytes_text, flops_text, seconds_text
from tests.mm.harness import small


def table(world: int, **layout: Any) -> list[list[str]]:
    raw = small(data={"train": ["nothing-*.tar"]}, layout=layout, schedule={"microbatches": 2})
    del raw["model"]["audio"]
    lines = rank_table(draw_up(from_mapping(raw, Path()), world))
    starts = [lines[0].index(name) for name in ("ranks", "vision", "llm")]
    ends = [*starts[1:], None]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines[1:]]


def test_few_ranks_have_a_row_each_and_many_share_rows() -> None:
    few = table(4, vision={"ranks": "2-3"}, llm={"ranks": "0-3", "pp": 2})
    assert few == [
        ["0", "-", "dp0 pp0"],
        ["1", "-", "dp1 pp0"],
        ["2", "dp0", "dp0 pp1"],
        ["3", "dp1", "dp1 pp1"],
    ]
    many = table(2 * ROWS, vision={"ranks": "24-31", "tp": 2}, llm={"ranks": "0-31", "tp": 2, "pp": 2})
    assert many == [
        ["0-15", "-", "tp0-1 dp0-7 pp0"],
        ["16-23", "-", "tp0-1 dp0-3 pp1"],
        ["24-31", "tp0-1 dp0-3", "tp0-1 dp4-7 pp1"],
    ]


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(40), "40 B"),
        (bytes_text(45 * 2**10), "45.0 KiB"),
        (bytes_text(7347186 * 2**10), "7.01 GiB"),
        (flops_text(5414134.69e9), "5.41 PFLOP"),
        (flops_text(1.03e9), "1.03 GFLOP"),
        (flops_text(900.0), "900 FLOP"),
        (seconds_text(0.003266), "3.266 ms"),
        (seconds_text(7.3e-5), "73 µs"),
        (seconds_text(0.0), "0 s"),
    ],
)
def test_numbers_are_in_units_that_suit_them(shown: str, text: str) -> None:
    assert shown == text


@given(st.floats(1e-9, 1e24))
def test_nothing_is_shown_as_zero_that_is_not(n: float) -> None:
    for show in (bytes_text, flops_text, seconds_text):
        assert float(show(n).split()[0]) > 0
