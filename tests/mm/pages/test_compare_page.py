"""The report of a comparison: what was measured is there, on one scale, and names cannot act."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from mm.compare.result import Comparison, RunResult, StepSeconds
from mm.pages.bars import Scale, bars
from mm.pages.compare_page import compare_page
from mm.pages.html import clean
from mm.pages.tables import size
from tests.mm.pages.compared import comparison
from tests.mm.pages.strict_parser import Checked
from tests.mm.pages.test_run_page import EVIL


def test_the_page_has_what_was_measured() -> None:
    page = Checked(compare_page(comparison()))
    text = " ".join(page.said)
    for found in (
        *("disjoint 0 is fastest.", "Try disjoint.", "python -m mm compare disjoint", "run: disjoint 2"),
        *("250 ms", "0.500x", "0.450 to 0.550", "slower", "50.0 %", "4,000", "1 GiB", "1.0e-08", "1.25"),
        *("disjoint 1: step 3", "2 rows, 400 ms", "boundary", "optimizer", "waits for inputs", "2 GiB"),
    ):
        assert found in text, found


def test_timelines_have_one_scale() -> None:
    """The same second has the same place in all of them: the longest step fills its picture."""
    pictures = re.findall(r"<svg xmlns.*?</svg>", compare_page(comparison()), re.S)
    assert len(pictures) == 3
    widest = []
    for picture in pictures:
        boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="30', picture)
        widest.append(max(float(x) + float(w) for x, w in boxes))
    spans = [w - 168 for w in widest]  # from the start of the step, which is at 168
    assert all(abs(s / spans[0] - k) < 0.01 for k, s in enumerate(spans, 1))


@settings(max_examples=3, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_nothing_in_a_comparison_acts(name: str) -> None:
    name = name.encode(errors="ignore").decode() + EVIL
    page = Checked(compare_page(comparison(name, 2)))
    assert page.tags.count("script") == 1 and clean(name) in "".join(page.said)


def test_a_comparison_that_knows_little_has_a_page() -> None:
    """As one that is read from an older JSON, or of one layout of which nothing was watched."""
    run = RunResult("a", {}, StepSeconds(1.0, 1.0, 1.0), 1.0, 1, 0.0, [], [], 0.0, 0.0, 1.0, None, "baseline")
    assert "baseline" in "".join(Checked(compare_page(Comparison([run]))).said)
    Checked(compare_page(Comparison([])))


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1e12), max_size=8), st.floats(1, 10))
def test_bars_are_as_long_as_their_values(row: dict[str, float], more: float) -> None:
    whole = sum(row.values())
    picture = bars("m", "Memory", {"r": row}, size, Scale(most=more * whole))
    if not whole:
        assert not picture
        return
    lengths = [
        float(w)
        for w in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="16" class', picture)
    ]
    assert len(lengths) == sum(v > 0 for v in row.values())
    drawn = sum(lengths) + 0.6 * len(lengths)
    assert abs(drawn - (392 - 104) / more) < 1.1 * len(lengths)
