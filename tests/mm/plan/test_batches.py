"""Steps whose samples are looked up together are the steps that are looked up one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning.synthetic import inputs, samples
from mm.errors import DataError
from mm.order.chosen import Chosen, Range
from mm.order.skips import Skips
from mm.order.stream import Source, Stream
from mm.plan.batches import Batches
from mm.plan.table import SampleTable
from parallel.sequence.intervals import Column

MADE = inputs(8, 3)
OUT = st.lists(st.integers(0, 20), max_size=3)
TABLE = SampleTable.of(samples(24), MADE)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), size=st.integers(1, 7), ahead=st.integers(1, 40))
def test_steps_that_are_looked_up_together_are_the_same(data: st.DataObject, size: int, ahead: int) -> None:
    sources = [Source("a", Chosen.of([Range(0, 9)])), Source("b", Chosen.of([Range(9, 15)]), epochs=3)]
    stream, bad = Stream.of(5, sources, {0: [1, 2], 30: [1, 0]}), frozenset[int]()
    skips = Skips.of((first, first + data.draw(st.integers(0, 2))) for first in data.draw(OUT))
    plain, many = Batches(stream, size, None, skips), Batches(stream, size, None, skips, ahead=ahead)
    for step in (data.draw(st.integers(0, 12)) for _ in range(4)):
        for k in range(step, step + 4):
            if data.draw(st.booleans()):  # one of the next step's, which has been looked up already
                bad |= {int(plain.ids(k, bad)[0])} - {0, 9}
            one, other = (b.plan(k, TABLE.take, MADE, bad) for b in (plain, many))
            assert (one.digest, one.sample_ids) == (other.digest, other.sample_ids)
            assert np.array_equal(one.digests, other.digests)


def test_what_cannot_be_looked_up_is_found_at_its_own_step() -> None:
    stream = Stream.of(0, [Source("", Chosen.of([Range(0, 24)]), epochs=1)])
    batches, asked = Batches(stream, 4, ahead=24), list[int]()
    wrong = int(batches.ids(4)[0])

    def lookup(which: Column) -> SampleTable:
        asked.append(len(which))
        if wrong in which:
            raise DataError("does not fit")
        return TABLE.take(which)

    for step in range(4):
        batches.plan(step, lookup, MADE)
    with pytest.raises(DataError, match="does not fit"):
        batches.plan(4, lookup, MADE)
    asked.clear()
    for step in range(6):  # the last one is whole
        batches.plan(step, lookup, MADE, {wrong})
    assert asked == [24]
    with pytest.raises(DataError, match="end after 24 samples"):
        batches.plan(6, lookup, MADE, {wrong})
