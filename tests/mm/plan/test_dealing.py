"""Samples and items are dealt once each, by cost, and never worse than by number."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning.synthetic import inputs, samples
from llm.config import LLMConfig
from llm.flops import document_cost, flops
from mm.order.packing import pack
from mm.plan.dealing import (
    ROOM,
    SPREAD,
    Packed,
    Seats,
    by_count,
    deal_items,
    deal_packed,
    deal_samples,
    home_ranks,
    load_imbalance,
    over_step,
)
from mm.plan.step_plan import plan_step
from parallel.sequence.dealing import loads, longest_first
from parallel.sequence.intervals import shares


def long_tailed(n: int, seed: int = 0) -> np.ndarray:
    """Lengths in tokens."""
    return np.clip(np.random.default_rng(seed).lognormal(6, 1.1, n), 20, 20_000).astype(np.int64)


def cost_of(tokens: np.ndarray) -> np.ndarray:
    return tokens + 1e-3 * tokens.astype(float) ** 2


def by_place(values: np.ndarray, seats: Seats, microbatches: int, dp: int) -> np.ndarray:
    return loads(values.astype(float), seats.microbatch * dp + seats.dp, microbatches * dp).reshape(-1, dp)


def waited(cost: np.ndarray, seats: Seats, microbatches: int, dp: int) -> float:
    most = by_place(cost, seats, microbatches, dp).max(axis=1)
    return float(most.sum() + most.max())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 30), st.sampled_from([1, 500, 10_000])), max_size=60),
    st.integers(1, 7),
    st.integers(1, 9),
)
def test_samples_are_dealt_no_worse_than_by_number(lengths: list[int], microbatches: int, dp: int) -> None:
    tokens, n = np.asarray(lengths, dtype=np.int64), len(lengths)
    cost = cost_of(tokens)
    others = [tokens * 0.5, np.where(np.arange(n) % 3, 0.0, 7.0)]
    seats = deal_samples(cost, tokens, others, microbatches, dp)
    again = deal_samples(cost, tokens, others, microbatches, dp)
    assert all(np.array_equal(a, b) for a, b in zip(seats, again, strict=True))
    assert len(seats.microbatch) == len(seats.dp) == n  # every sample, once
    assert not n or (seats.microbatch.min() >= 0 and seats.microbatch.max() < microbatches)
    assert not n or (seats.dp.min() >= 0 and seats.dp.max() < dp)
    plain = by_count(n, microbatches, dp)
    expected = [
        (k, d)
        for k, (a, b) in enumerate(shares(n, microbatches))
        for d, s in enumerate(shares(b - a, dp))
        for _ in range(*s)
    ]
    assert list(zip(*(c.tolist() for c in plain), strict=True)) == expected
    new, old = (by_place(tokens, s, microbatches, dp) for s in (seats, plain))
    assert new.max() <= old.max()
    new, old = (by_place(cost, s, microbatches, dp) for s in (seats, plain))
    assert new.max() <= old.max() * (1 + 1e-9)
    if n:
        assert waited(cost, seats, microbatches, dp) <= waited(cost, plain, microbatches, dp) * (1 + 1e-9)
    # Micro-batches have work for equally many dp ranks.
    if n <= microbatches * dp:
        used = (new > 0).sum(axis=1)
        assert used.max() - used.min() <= 1


def test_one_giant_does_not_make_all_wait() -> None:
    """Alone in its bin, and with other long ones in its micro-batch."""
    tokens = np.asarray([100] * 60 + [3000] * 4)
    seats = deal_samples(tokens.astype(float), tokens, [], 4, 4)
    most = by_place(tokens, seats, 4, 4).max(axis=1)
    assert sorted(most.tolist()) == [500, 500, 500, 3000]
    assert len(set(seats.microbatch[-4:].tolist())) == 1 and len(set(seats.dp[-4:].tolist())) == 4


def test_an_encoder_keeps_its_costliest_micro_batch_in_bounds() -> None:
    """The longest samples have all the pictures: together in one micro-batch they would not fit."""
    tokens = long_tailed(1024)
    pictures = np.where(tokens > np.quantile(tokens, 0.9), tokens, 0).astype(float)
    dealt = [deal_samples(tokens.astype(float), tokens, o, 16, 16) for o in ([], [pictures])]
    free, bounded = (loads(pictures, s.microbatch, 16).max() for s in dealt)
    plain = loads(pictures, by_count(1024, 16, 16).microbatch, 16).max()
    assert bounded <= max(SPREAD * pictures.sum() / 16, plain) * (1 + 1e-9) < free


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_a_long_tail_is_even_over_64_ranks(streams: int) -> None:
    tokens = long_tailed(64 * 64 * streams)
    cost = cost_of(tokens)
    seats = deal_samples(cost, tokens, [], 64, 64)
    dealt = load_imbalance(cost, *seats, 64, 64).mean()
    plain = load_imbalance(cost, *by_count(len(cost), 64, 64), 64, 64).mean()
    assert dealt < 1.12 and plain > 6
    # Over the step, no dp rank has more either.
    of_rank, other = (
        by_place(cost, s, 64, 64).sum(axis=0).max() for s in (seats, by_count(len(cost), 64, 64))
    )
    assert of_rank < other


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 5, 40]), st.integers(0, 5)), max_size=60),
    st.integers(1, 6),
)
def test_items_are_within_the_bound_of_longest_first(lines: list[tuple[int, int, int]], dp: int) -> None:
    microbatch, cost, home = np.asarray(sorted(lines), dtype=np.int64).reshape(-1, 3).T
    home, cost = home % dp, cost.astype(float)
    dealt = deal_items(cost, microbatch, home, np.zeros((4, dp)))
    bound = longest_first(cost, microbatch, np.zeros((4, dp))).load.max(axis=1)
    load = loads(cost, microbatch * dp + dealt, 4 * dp).reshape(4, dp)
    assert (load.max(axis=1) <= bound * (1 + 1e-9)).all()
    most = [cost[microbatch == k].max(initial=0) for k in range(4)]
    assert (load.max(axis=1) <= loads(cost, microbatch, 4) / dp + most + 1e-9).all()
    at_home = loads(cost, microbatch * dp + home, 4 * dp).reshape(4, dp)
    even = at_home.max(axis=1) <= bound
    assert (dealt == home)[even[microbatch]].all(), "nothing leaves home where nothing is gained"


def test_equal_items_at_home_stay_there() -> None:
    for dp in (1, 3, 8):
        home = np.arange(dp)
        assert (deal_items(np.ones(dp), np.zeros(dp, np.int64), home, np.zeros((1, dp))) == home).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40), st.integers(1, 9))
def test_the_home_of_a_sample_is_beside_it(places: list[tuple[int, int]], encoder_dp: int) -> None:
    microbatch, dp_of = np.asarray(sorted(places), dtype=np.int64).T
    home = home_ranks(microbatch, dp_of, 4, encoder_dp)
    assert (home * 4 // encoder_dp <= dp_of).all() and ((home + 1) * 4 > dp_of * encoder_dp).all()
    if encoder_dp == 4:
        assert (home == dp_of).all()
    for k in range(3):  # in order: samples of one dp rank are split over its part
        for d in range(4):
            own = home[(microbatch == k) & (dp_of == d)]
            assert all(a <= b for a, b in pairwise(own.tolist()))


@given(st.integers(0, 1000))
def test_the_cost_of_documents_is_what_flops_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window = None if rng.random() < 0.3 else int(rng.integers(1, 4000))
    layers = None if window is None or rng.random() < 0.5 else (4,)
    mtp = int(rng.integers(0, 3))
    cfg = LLMConfig(pattern="M*-E*", mtp_layers=mtp, window=window, window_layers=layers)
    lengths, supervised = rng.integers(1, 5000, 7), rng.integers(0, 100, 7)
    found = document_cost(cfg).of(lengths, supervised)
    assert found.sum() == pytest.approx(flops(cfg, lengths.tolist(), int(supervised.sum())), rel=1e-12)


def test_the_language_model_is_in_the_imbalance() -> None:
    made = inputs(16, 8)
    plan = plan_step(0, samples(64), made)
    alone = plan_step(0, samples(64), inputs(8, 8))
    for found in plan.imbalance(None):
        assert found is not None and found.dealt >= 1
    assert all(i is not None and i.dealt == i.by_sample == 1 for i in alone.imbalance(None))
    few = plan_step(0, samples(3), inputs(64, 8))
    assert [i is None for i in few.imbalance(None)].count(False) == 3


def test_equal_costs_of_unequal_lengths_need_no_more_memory() -> None:
    """Where attention is all, one long sample costs what fifty short ones do, which together are longer."""
    tokens = np.asarray([100] + [10] * 50)
    seats = deal_samples(tokens.astype(float) ** 2, tokens, [], 1, 2)
    assert by_place(tokens, seats, 1, 2).tolist() == [[300, 300]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 40)), max_size=60),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 60),
)
def test_packed_sequences_share_a_micro_batch_and_bound_what_a_rank_packs(
    lines: list[tuple[int, int]], sequences: int, microbatches: int, dp: int, spare: int
) -> None:
    sequence, tokens = np.asarray(lines, dtype=np.int64).reshape(-1, 2).T
    sequence = sequence % sequences
    capacity = int(np.bincount(sequence, tokens, sequences).max()) + spare
    packed = Packed(sequence, sequences, capacity)
    seats = deal_packed(cost_of(tokens), tokens, packed, [tokens * 1.0], microbatches, dp)
    place = seats.microbatch * dp + seats.dp
    for k in range(sequences):
        assert len(set(seats.microbatch[sequence == k].tolist())) <= 1
    most = -(-sequences // min(sequences, microbatches * dp))
    assert by_place(tokens, seats, microbatches, dp).max() <= most * capacity
    assert place.max(initial=0) < microbatches * dp


@pytest.mark.parametrize("length, microbatches", [(8192, 8), (32_768, 8), (32_768, 4)])
def test_the_work_of_64_ranks_is_even(length: int, microbatches: int) -> None:
    """Over a step, on lengths as real corpora have them; by number it is twice the mean."""
    rng = np.random.default_rng(1)
    tokens = np.clip(rng.lognormal(6, 1.1, 8 * 8192), 16, length).astype(np.int64)
    packed = pack(tokens, length, 0)
    here = packed < 64 * microbatches
    tokens, packed = tokens[here], packed[here]
    cost = 16e9 * tokens + 262e3 * tokens.astype(float) ** 2
    seats = deal_packed(cost, tokens, Packed(packed, 64 * microbatches, length), [], microbatches, 64)
    of_rank = by_place(cost, seats, microbatches, 64).sum(axis=0)
    plain = by_place(cost, by_count(len(cost), microbatches, 64), microbatches, 64).sum(axis=0)
    assert of_rank.max() / of_rank.mean() < 1.03 and plain.max() / plain.mean() > 1.2
    filled = by_place(tokens, seats, microbatches, 64)
    assert filled.max() <= length and filled.mean() >= 0.97 * length


def test_items_fill_what_ranks_have_left() -> None:
    """A rank with more of the LLM's work gets fewer items; on ranks of their own, sums are evened."""
    home, cost, nowhere = np.arange(40) % 4, np.ones(40), np.zeros(40, dtype=np.int64)
    already = np.asarray([[12.0, 0.0, 4.0, 4.0]])
    dealt = deal_items(cost, nowhere, home, already)
    assert (already[0] + np.bincount(dealt, minlength=4)).tolist() == [15, 15, 15, 15]
    rng = np.random.default_rng(0)
    cost, microbatch = rng.lognormal(0, 1, 90), np.sort(rng.integers(0, 8, 90))
    dealt = deal_items(cost, microbatch, np.zeros(90, dtype=np.int64), np.zeros((8, 4)))
    turned = over_step(cost, microbatch, dealt, 8, 4)
    before, after = (loads(cost, microbatch * 4 + d, 32).reshape(8, 4) for d in (dealt, turned))
    most = np.maximum(before.max(axis=1), ROOM * before.mean(axis=1))
    assert np.allclose(before.sum(axis=1), after.sum(axis=1)) and (after.max(axis=1) <= most * 1.000001).all()
    assert after.sum(axis=0).max() < 1.01 * cost.sum() / 4 < before.sum(axis=0).max()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=50), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9))
def test_evening_a_step_never_costs_more(items: list[int], microbatches: int, dp: int, seed: int) -> None:
    cost = np.asarray(items, dtype=float)
    microbatch = np.random.default_rng(seed).integers(0, microbatches, len(items))
    dealt = deal_items(cost, microbatch, np.zeros(len(items), dtype=np.int64), np.zeros((microbatches, dp)))
    turned = over_step(cost, microbatch, dealt, microbatches, dp)
    before, after = (
        loads(cost, microbatch * dp + d, microbatches * dp).reshape(-1, dp) for d in (dealt, turned)
    )
    most = np.maximum(before.max(axis=1), ROOM * before.mean(axis=1))
    assert (after.max(axis=1) <= most * (1 + 1e-6)).all() and turned.max(initial=0) < dp
    assert after.sum(axis=0).max() <= before.sum(axis=0).max() * (1 + 1e-6)
