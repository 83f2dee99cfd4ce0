"""Packing: every sample once, none too long, nearly full, the same from any step on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning.synthetic import inputs, samples
from mm.data.sample import Part, Sample, Segment
from mm.errors import DataError
from mm.order.chosen import Chosen, Range
from mm.order.packing import SPARE, best_fit, pack
from mm.order.stream import Source, Stream
from mm.plan import batches as batches_of
from mm.plan.batches import Batches, Windows
from mm.plan.table import SampleTable
from parallel.sequence.intervals import Column
from parallel.topology.layout import make_layout

NOBODY = np.zeros(0, dtype=np.int64)
MADE = inputs(4, 2)
CAPACITY, WINDOW, SIZE = 200, 23, 3


def texts(lengths: list[int]) -> SampleTable:
    """Samples of so many tokens."""
    made = [
        Sample(j, str(j), "s", (Segment("text", n - 2, None, True, None),), Part("s", "json", j, 1, "", {}))
        for j, n in enumerate(lengths)
    ]
    return SampleTable.of(made, MADE)


@given(st.lists(st.integers(0, 50), max_size=80), st.integers(50, 63))
def test_best_fit_is_what_it_says(lengths: list[int], capacity: int) -> None:
    found = best_fit(np.asarray(lengths, dtype=np.int64), capacity).tolist()
    room: list[int] = []
    for j in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        fits = [(left, k) for k, left in enumerate(room) if left >= lengths[j]]
        if not fits:
            room.append(capacity)
        best = min(fits)[0] if fits else capacity
        assert room[found[j]] == best, "the fullest sequence that has room"
        room[found[j]] -= lengths[j]
    assert len(room) == len(set(found))
    assert capacity < SPARE, "where a 64th is no token, pack() leaves none empty"
    mixed = pack(np.asarray(lengths, dtype=np.int64), capacity, 5).tolist()
    assert len({*zip(found, mixed, strict=True)}) == len(set(found)), "the same sequences in another order"


@pytest.mark.parametrize(("capacity", "least"), [(8192, 0.98), (32_768, 0.97)])
def test_a_long_tail_is_packed_nearly_full(capacity: int, least: float) -> None:
    for seed in range(3):
        drawn = np.random.default_rng(seed).lognormal(6, 1.1, 8192)
        lengths = np.clip(drawn, 16, capacity).astype(np.int64)
        found = pack(lengths, capacity, seed)
        filled = np.bincount(found, lengths)
        assert filled.max() <= capacity and filled.mean() / capacity > least
        # Long samples come anywhere in a window, not first.
        long = found[lengths > np.quantile(lengths, 0.99)] / (found.max() + 1)
        assert abs(long.mean() - 0.5) < 0.12


def packed(lengths: list[int], **more: object) -> Batches:
    return Batches(Stream.whole(4, len(lengths)), SIZE, Windows(CAPACITY, WINDOW, NOBODY), **more)  # type: ignore[arg-type]


LENGTHS = st.lists(st.integers(2, CAPACITY), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 12))
def test_a_run_goes_on_alike_from_any_step(lengths: list[int], stop: int) -> None:
    table = texts(lengths)
    whole, again = packed(lengths), packed(lengths)
    steps = [whole.sequences(step, table.take) for step in range(15)]
    looked: list[int] = []

    def lookup(ids: Column) -> SampleTable:
        looked.append(len(ids))
        return table.take(ids)

    resumed = packed(lengths, cursors={stop: again.cursor(stop, table.take)})
    for step in range(stop, 15):
        for ours, theirs in zip(resumed.sequences(step, lookup), steps[step], strict=True):
            assert np.array_equal(ours, theirs)
        if step == stop and whole.cursors[stop + 1].window == whole.cursors[stop].window:
            assert looked == [WINDOW], "one window is packed again, whatever came before"
    jumped = packed(lengths).sequences(stop, table.take)  # also without the steps before
    assert np.array_equal(jumped[0], steps[stop][0])
    # Together the steps have every sample as often as the stream, window by window.
    windows = whole.cursors[15].window
    assert windows >= 15 * SIZE // WINDOW, "a window gives a sequence a sample at most"
    stream, _ = Stream.whole(4, len(lengths)).at(np.arange(windows * WINDOW))
    taken = np.concatenate([ids for ids, _ in steps])
    assert not Counter(stream.tolist()) - Counter(taken.tolist())
    for ids, sequence in steps:
        assert np.bincount(sequence, table.length[ids]).max() <= CAPACITY
        assert set(sequence.tolist()) == set(range(SIZE))


def test_where_steps_began_is_remembered_for_the_last_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_of, "KEPT", 5)
    table, one = texts([7, 30, 400, 90]), packed([7, 30, 400, 90])
    found = [one.sequences(step, table.take)[0].tolist() for step in range(40)]
    assert sorted(one.cursors) == [*range(35, 41)]
    assert [one.sequences(step, table.take)[0].tolist() for step in range(36, 40)] == found[36:]


def test_the_plan_is_that_of_any_number_of_ranks() -> None:
    table = SampleTable.of(samples(300), MADE)
    found = []
    for world in (1, 2, 3, 4):
        layout = make_layout("llm", world, {})
        made = replace(
            MADE, llm=layout, encoders={m: replace(u, layout=layout) for m, u in MADE.encoders.items()}
        )
        batches = Batches(Stream.whole(0, 300), 8, Windows(21_000, 64, NOBODY))
        plans = [batches.plan(step, table.take, made) for step in range(4)]
        found.append([(sorted(p.sample_ids), p.ends, p.supervised) for p in plans])
        for plan in plans:
            assert plan.filled.max() <= -(-8 // (2 * made.llm.dp)) * 21_000, "activations are bounded"
    assert all(f == found[0] for f in found)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sets(st.integers(0, 59), max_size=20))
def test_an_unreadable_sample_leaves_its_place_empty(lengths: list[int], bad: set[int]) -> None:
    table = texts(lengths)
    for step in range(4):
        ids, _ = packed(lengths).sequences(step, table.take)
        plan = packed(lengths).plan(step, table.take, MADE, bad)
        assert sorted(plan.sample_ids) == sorted(i for i in ids.tolist() if i not in bad)
        assert plan.ends == packed(lengths).cursor(step + 1, table.take)


def test_samples_that_the_config_leaves_out_are_replaced_before_packing() -> None:
    lengths = [10 + k for k in range(50)]
    table, left_out = texts(lengths), np.arange(0, 50, 2)
    batches = Batches(Stream.whole(4, 50), SIZE, Windows(CAPACITY, WINDOW, left_out))
    for step in range(5):
        ids, sequence = batches.sequences(step, table.take)
        assert not set(ids.tolist()) & set(left_out.tolist())
        assert np.bincount(sequence, table.length[ids]).max() <= CAPACITY


def test_packing_ends_with_its_sources() -> None:
    table = texts([20] * 30)
    stream = Stream.of(4, [Source("a", Chosen.of([Range(0, 30)]), epochs=2)])
    batches = Batches(stream, 1, Windows(CAPACITY, WINDOW, NOBODY))
    taken = [i for step in range(8) for i in batches.sequences(step, table.take)[0].tolist()]
    assert set(Counter(taken).values()) == {2}
    with pytest.raises(DataError, match="end after 60 samples"):
        batches.sequences(8, table.take)
