"""How much of a weight each data rank has, beside torch's own way to split a tensor."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.virtual.records import Part
from mm.virtual.sums import bytes_of


@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_a_rank_has_its_chunk_of_each_weight(rows: int, ranks: int, wide: int) -> None:
    named = {"llm.data": tuple(range(0, 3 * ranks, 3))}
    chunks = [len(c) for c in torch.empty(rows, wide).chunk(ranks)] if rows else []
    parts = (Part(rows, 4 * wide, "llm.data"), Part(1, 12, ""))
    for k, rank in enumerate(named["llm.data"]):
        own = chunks[k] if k < len(chunks) else 0
        assert bytes_of(parts, rank, named) == 4 * wide * own + 12
