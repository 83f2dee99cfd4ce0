"""Attention under a window, and with bounded scores, against whole score matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel.sequence.buckets import LEAST_BLOCK, Limits, Pairing, attend
from parallel.sequence.packed import Packing
from parallel.sequence.tiles import TILE, Attended, Scoring, tiled, tiled_backward


def plain(q: Tensor, k: Tensor, v: Tensor, window: int, cap: float | None) -> Tensor:
    """Of one sequence, whose queries are its last positions: q [n, H, D], k and v [m, H_kv, D]."""
    n, m = len(q), len(k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = 0.7 * torch.einsum("qhd,khd->hqk", q, k)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    back = torch.arange(m - n, m)[:, None] - torch.arange(m)
    scores = scores.masked_fill((back < 0) | (back >= window), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@example([(300, 0), (64, 0), (5, 3)], 4, None, 0)
@example([(130, 3)], 4, 0.5, 0)
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 99)), max_size=4),
    st.integers(1, 100),
    st.sampled_from([None, 0.5]),
    st.integers(0, 99),
)
def test_queries_see_a_window(
    counts: list[tuple[int, int]], window: int, cap: float | None, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    queries = [n for n, _ in counts]
    keys = [n + min(ahead, window - 1) if n else 3 for n, ahead in counts]
    shapes = ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2))
    q, k, v = (torch.randn(n, h, 3, dtype=torch.float64, generator=gen).requires_grad_() for n, h in shapes)
    weight = torch.randn(q.shape, dtype=torch.float64, generator=gen)
    pairing = Pairing.windowed(queries, keys, window)
    ours = attend(q, k, v, pairing, causal=True, scale=0.7, limits=Limits(cap=cap))
    parts = [
        plain(*one, window, cap) for one in zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    ]
    theirs = torch.cat(parts) if parts else q
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum() + 0 * (k.sum() + v.sum()), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 700, 1500])
def test_tiles_of_a_window(window: int) -> None:
    gen = torch.Generator().manual_seed(window)
    n = 2 * TILE + 77
    q, k, v, grad = (torch.randn(n, 1, 3, generator=gen, dtype=torch.float64) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    expected = plain(q, k, v, window, 0.5)
    found = torch.autograd.grad((expected * grad).sum(), (q, k, v))
    first = [x.detach().transpose(0, 1) for x in (q, k, v)]
    scoring = Scoring(0.7, 0.5, last=0, window=window)
    out, lse = tiled(*first, scoring)
    torch.testing.assert_close(out.transpose(0, 1), expected.detach(), rtol=0, atol=1e-12)
    grads = tiled_backward(grad.transpose(0, 1), *first, Attended(out, lse), scoring)
    for a, b in zip(grads, found, strict=True):
        torch.testing.assert_close(a.transpose(0, 1), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_cost_grows_with_the_window(cap: float | None) -> None:
    def flops(n: int, window: int) -> int:
        x = torch.randn(n, 1, 8)
        with FlopCounterMode(display=False) as counter:
            attend(x, x, x, Packing.of([n]).windowed(window), causal=True, limits=Limits(cap=cap))
        return int(counter.get_total_flops())

    pair = 4 * 8  # FLOPs of a score and its value
    for n, window in ((4096, 64), (4096, 256), (8192, 64)):
        assert flops(n, window) <= pair * n * (window + max(window, LEAST_BLOCK))
