"""Packed operations are the plain operations on each sequence alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.sequence.packed import Packing, attention, depthwise_conv

LENGTHS = [
    [5],
    [3, 1, 8],
    [4, 4, 4],
    [0, 6, 0, 0, 2],
    [17, 16, 9, 31, 1, 0, 2],
]


def make(*shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=gen, dtype=torch.float64).requires_grad_()


def same(ours: Tensor, theirs: Tensor, args: list[Tensor]) -> None:
    """Equal values, and equal gradients of a weighted sum."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), args),
        torch.autograd.grad((theirs * weight).sum(), args),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[L, H, D] by the formula."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if causal:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hij,jhd->ihd", score.softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention(lengths: list[int], kv_heads: int, causal: bool) -> None:
    t = sum(lengths)
    q, k, v = make(t, 4, 6), make(t, kv_heads, 6), make(t, kv_heads, 6)
    ours = attention(q, k, v, Packing.of(lengths), causal=causal)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    same(ours, torch.cat([softmax_attention(*p, causal) for p in parts]), [q, k, v])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_depthwise_conv(lengths: list[int], width: int, causal: bool) -> None:
    x, weight, bias = make(sum(lengths), 7), make(7, width), make(7)
    ours = depthwise_conv(x, weight, bias, Packing.of(lengths), causal=causal)
    left = width - 1 if causal else width // 2
    parts = []
    for part in x.split(lengths):
        padded = F.pad(part, (0, 0, left, width - 1 - left))
        taps = [padded[k : k + len(part)] * weight[:, k] for k in range(width)]
        parts.append(torch.stack(taps).sum(0) + bias)
    same(ours, torch.cat(parts), [x, weight, bias])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_stays_in_the_graph(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    q, k, v = make(0, 2, 4), make(0, 1, 4), make(0, 1, 4)
    x, weight = make(0, 3), make(3, 4)
    out = (
        attention(q, k, v, packing, causal=True).sum()
        + depthwise_conv(x, weight, None, packing, causal=True).sum()
    )
    out.backward()
    assert all(t.grad is not None and not t.grad.any() for t in (q, k, v, x, weight))


def test_indices() -> None:
    packing = Packing.of([2, 0, 3])
    assert packing.total == 5
    assert packing.starts.tolist() == [0, 2, 2, 5]
    assert packing.sequence_id.tolist() == [0, 0, 2, 2, 2]
    assert packing.position.tolist() == [0, 1, 0, 1, 2]
