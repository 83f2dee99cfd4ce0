"""What models may have beside their sizes, counted as the code that runs does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.config.schema import from_mapping
from mm.plan.blueprint import Blueprint, draw_up
from mm.predict.count.layers import layer_counts, like
from mm.predict.count.moe import own_rows
from mm.predict.count.packed import attended, in_windows, window_crossing, windowed
from mm.predict.count.pieces import How
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Low
from mm.predict.count.weights import gather_messages, owned
from mm.virtual.values import drawn_choices
from parallel.context_parallel import pack
from parallel.context_parallel.window import _plan
from parallel.schedule.action import BACKWARD, FORWARD, Action
from parallel.sequence.buckets import Pairing
from parallel.topology.axis import Axis
from parallel.topology.data_parallel import POLICIES
from tests.mm.harness import CONFIGS, small
from tests.mm.predict.test_tape import CFG, LENGTHS, load_of

CPU = torch.device("cpu")
EXPERTS = replace(CFG, pattern="E", n_experts=4, top_k=2, expert_ffn=64)


def shapes(pairing: Pairing) -> tuple[list[tuple[int, ...]], int, bool]:
    """Of a pairing's buckets; bytes of its numbers and masks; whether rows are the batch as they lie."""
    found, held = [], 0
    for b in pairing.buckets:
        found.append((*b.queries.shape, b.keys.shape[1], len(b.rows), b.window))
        given = [b.queries, b.rows, b.slots, b.mask, None if b.keys is b.queries else b.keys]
        held += sum(x.numel() * x.element_size() for x in given if x is not None)
    return found, held, pairing.one_batch


def counted(pairing: Pairing, queries: list[int], keys: list[int], window: int) -> None:
    here = in_windows(queries, keys, window)
    found = [(b.n, b.queries, b.keys, b.real, b.window) for b in here.buckets]
    assert (found, here.indices, here.one_batch) == shapes(pairing)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1), st.integers(1, 200))
def test_windows_are_cut_as_they_are_attended(documents: list[tuple[int, int]], window: int) -> None:
    queries = [n for n, _ in documents]
    keys = [n + (more % window if n else 0) for n, more in documents]
    if any(queries):
        counted(Pairing.windowed(queries, keys, window, CPU), queries, keys, window)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("rank", range(2))
def test_windows_over_cp_are_planned_as_they_are_fetched(order: str, rank: int) -> None:
    # A group is asked for by exchanges alone, of which a plan makes none.
    axis = Axis("cp", 2, rank, group=object())  # type: ignore[arg-type]
    packing = pack([150, 90, 60, 100], CPU, axis, order)  # type: ignore[arg-type]
    here = window_crossing(packing, 40)  # type: ignore[arg-type]
    assert here.before is not None
    wide = in_windows(*window_lengths(packing, 40), 40)
    assert here.attended == wide and here.before.takes <= 39 * len(packing.continued)  # type: ignore[attr-defined]


def window_lengths(packing: object, window: int) -> tuple[list[int], list[int]]:
    lengths = list(packing.fragments.lengths)  # type: ignore[attr-defined]
    keys = list(lengths)
    for c in packing.continued:  # type: ignore[attr-defined]
        keys[c.fragment] += min(window - 1, c.before[1] - c.before[0])
    return lengths, keys
