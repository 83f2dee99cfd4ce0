"""Attention of some of the queries of packed sequences to all of their keys. Whole sequences: test_packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.sequence.buckets import Pairing, attend


@example([(2, 5), (0, 4), (2, 7), (2, 6)], 0)  # one bucket with padded keys
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=6), st.integers(0, 99))
def test_queries_see_the_keys_of_their_sequence(counts: list[tuple[int, int]], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    queries, keys = [q for q, _ in counts], [k for _, k in counts]
    q, k, v = (
        torch.randn(n, 2, 4, dtype=torch.float64, generator=gen) for n in (sum(queries), *[sum(keys)] * 2)
    )
    parts = []
    for one, ks, vs in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        scores = torch.einsum("qhd,khd->hqk", one, ks) / 2.0
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    expected = torch.cat(parts) if parts else q
    assert torch.allclose(attend(q, k, v, Pairing.of(queries, keys)), expected, rtol=0, atol=1e-12)


def test_padding_less_than_doubles() -> None:
    lengths = [1, 2, 3, 4, 5, 8, 9]
    for bucket in Pairing.of(lengths, lengths[::-1]).buckets:
        assert bucket.queries.numel() < 2 * bucket.rows.numel()
        assert bucket.mask is None or bucket.mask.numel() < 2 * int(bucket.mask.sum())


@pytest.mark.parametrize(
    ("queries", "keys", "one_batch"),
    [
        ([4, 4], [4, 4], True),
        ([2, 0, 2], [8, 0, 8], True),
        ([2, 0, 2], [8, 8, 8], False),  # keys that no query sees
        ([3, 4], [4, 4], False),
        ([4, 4], [3, 4], False),
        ([1, 4], [4, 4], False),
        ([], [], False),
    ],
)
def test_rows_without_padding_are_a_batch_as_they_lie(
    queries: list[int], keys: list[int], one_batch: bool
) -> None:
    assert Pairing.of(queries, keys).one_batch is one_batch
