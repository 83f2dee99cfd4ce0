"""The rows, documents and positions of a split stream are those of the whole stream, on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.context_parallel import ContextPacking, pack
from parallel.sequence.packed import Packing
from parallel.sequence.stream import Order, piece_count
from parallel.topology.axis import Axis

lengths_of = st.lists(st.integers(0, 30), max_size=7)
orders = st.sampled_from(["contiguous", "zigzag"])


def split(lengths: list[int], cp: int, order: Order) -> list[ContextPacking]:
    """Every rank's packing of the documents, padded to a length that splits evenly."""
    group: Any = object()
    whole = [*lengths, -sum(lengths) % piece_count(cp, order)]
    made = [pack(whole, "cpu", Axis("cp", cp, r, group), order) for r in range(cp)]
    assert all(isinstance(p, ContextPacking) for p in made)
    return made  # type: ignore[return-value]


@given(lengths_of, st.integers(2, 5), orders)
def test_ranks_hold_the_stream_once(lengths: list[int], cp: int, order: Order) -> None:
    ranks = split(lengths, cp, order)
    whole = Packing.of(ranks[0].lengths)
    held = np.concatenate([p.rows for p in ranks])
    assert sorted(held.tolist()) == list(range(whole.total))
    for p in ranks:
        rows = torch.from_numpy(p.rows)
        assert torch.equal(p.sequence_id, whole.sequence_id[rows])
        assert torch.equal(p.position, whole.position[rows])
        assert p.total == len(rows) == p.fragments.total
        for n in (0, whole.total // 3, whole.total):
            assert p.rows_before(n) == (p.rows < n).sum()


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_zigzag_shares_causal_attention_evenly(cp: int) -> None:
    # A query reads the keys up to its own.
    pairs = [int((p.rows + 1).sum()) for p in split([8 * cp], cp, "zigzag")]
    assert len(set(pairs)) == 1


@given(lengths_of, st.integers(2, 5), orders)
def test_fragments_are_runs_of_one_document(lengths: list[int], cp: int, order: Order) -> None:
    for p in split(lengths, cp, order):
        f = p.fragments
        continued = {c.fragment: c for c in p.continued}
        for i, (start, n) in enumerate(zip(f.starts.tolist(), f.lengths, strict=False)):
            assert n > 0
            assert p.sequence_id[start : start + n].unique().numel() == 1
            at = int(p.position[start])
            assert torch.equal(p.position[start : start + n], torch.arange(at, at + n))
            assert (at > 0) == (i in continued)
            if i in continued:
                c = continued[i]
                assert c.rows == (start, start + n) and c.before == (p.rows[start] - at, p.rows[start])


def test_one_rank_has_a_plain_packing() -> None:
    assert type(pack([3, 4], "cpu", Axis.single("cp"))) is Packing


def test_a_stream_that_does_not_split_is_refused() -> None:
    group: Any = object()
    with pytest.raises(ValueError, match=r"10 packed tokens do not split into 4 pieces.*pad to 12"):
        pack([10], "cpu", Axis("cp", 2, 0, group), "zigzag")


def test_operations_on_whole_documents_refuse_a_split_stream() -> None:
    with pytest.raises(AssertionError, match="split over cp"):
        _ = split([9], 2, "zigzag")[0].pairing
