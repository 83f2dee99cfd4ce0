"""A run with skips takes the batches of one without them, but for those that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.errors import DataError, Refused
from mm.order.skips import NONE, Skips, Span
from mm.plan.batches import Batches
from mm.plan.drawn import Drawn
from mm.plan.table import SampleTable
from tests.mm.plan.test_drawn import A, opened, written

SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1])), max_size=5
)


@given(SPANS)
def test_a_step_takes_the_next_batch_that_is_not_left_out(spans: list[tuple[int, int]]) -> None:
    skips, gone = Skips.of(spans), {b for first, last in spans for b in range(first, last + 1)}
    left = [b for b in range(100) if b not in gone][:50]
    assert [skips.batch(step) for step in range(50)] == left
    assert [skips.before(step) for step in range(51)] == [0, *(b + 1 for b in left)]
    assert Skips.parse(skips.written()) == skips
    for step in (0, 7, 30):
        passed = {b for first, last in skips.passed(step).spans for b in range(first, last + 1)}
        assert passed == {b for b in gone if b < skips.before(step)}
        # A run that goes on has these, and what it is told again.
        assert Drawn(left_out=skips.passed(step)).going_on(step, skips) == skips


def test_what_was_trained_on_cannot_be_left_out() -> None:
    drawn = Drawn(left_out=Skips((Span(3, 4),)))
    assert drawn.going_on(10, Skips.parse([5, "13-20"])).written() == ["4-5", "13-20"]
    with pytest.raises(Refused, match=r"'12'.* took batches up to 12; needed: batches from 13 on"):
        drawn.going_on(10, Skips.parse([12]))


@pytest.mark.parametrize("entry", [0, "x", "3-2", -1, "1-2-3", "", True])
def test_what_names_no_batch_is_refused(entry: int | str) -> None:
    with pytest.raises(ValueError, match="names no batches; needed: a number from 1"):
        Skips.parse([entry])


def test_samples_are_those_of_the_batches_that_stay_packed_or_not(tmp_path: Path) -> None:
    written(tmp_path, a=40)
    for more in ({}, {"pack": 30, "window": 10}):
        cfg, index, inputs = opened(tmp_path, [A], **more)
        table, skips = SampleTable.of(index.samples, inputs), Skips.parse([1, "4-6"])
        plain, short = Batches.of(cfg, index, skips=NONE), Batches.of(cfg, index, skips=skips)
        expected = [plain.plan(step, table.take, inputs).sample_ids for step in range(10)]
        found = [short.plan(step, table.take, inputs) for step in range(6)]
        assert [p.sample_ids for p in found] == [expected[b] for b in (1, 2, 6, 7, 8, 9)]
        drawn = Drawn()
        for plan in found[:2]:
            drawn = drawn.after(plan, skips)
        # It goes on where the batches are that are left out, with more of them.
        again = Batches.of(cfg, index, (2, drawn.cursor), drawn.going_on(2, Skips.parse(["4-6", 8])))
        later = [again.plan(step, table.take, inputs).sample_ids for step in (2, 3)]
        assert later == [expected[6], expected[8]]


def test_epochs_must_last_for_what_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, a=12)
    cfg, index, _ = opened(tmp_path, [{**A, "epochs": 1}])
    assert np.unique(Batches.of(cfg, index).ids(2)).size == 4  # three steps, three batches
    with pytest.raises(DataError, match=r"1 of them are left out; needed: more epochs, or train.steps=2"):
        Batches.of(cfg, index, skips=Skips.parse([2]))
