"""Attention over a split stream equals attention over the whole one, by gather and by ring."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.context_parallel import pack
from parallel.context_parallel.attention import Method, choose_attention_method, context_attention, key_costs
from parallel.context_parallel.block import attend, attend_backward
from parallel.sequence.buckets import Limits
from parallel.sequence.packed import Packing, attention
from parallel.sequence.stream import Order
from parallel.sequence.tiles import TILE, Attended, Scoring, tiled, tiled_backward
from parallel.topology.axis import Axis

METHODS: tuple[Method, ...] = ("gather", "ring")
STREAMS = [(16,), (3, 13), (8, 8), (1, 2, 5, 1, 7), (7, 0, 9), (0, 15, 1), (2,) * 8, (40,)]


def axis(cp: int) -> Axis:
    return Axis("cp", cp, dist.get_rank(), dist.group.WORLD)


def inputs(total: int, heads: int, kv_heads: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(total + heads)
    return [
        torch.randn(total, h, 4, generator=gen, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


LIMITS = (Limits(cap=0.8), Limits(window=3), Limits(window=6, cap=0.8), Limits(window=1))


def split_attention(cp: int, kv_heads: int, limited: Sequence[Limits]) -> list[tuple[Any, ...]]:
    out = []
    over = axis(cp)
    for lengths in STREAMS:
        q, k, v, weight = inputs(sum(lengths), 4, kv_heads)
        for limits, order, method in product(limited, ("contiguous", "zigzag"), METHODS):
            p: Any = pack(lengths, "cpu", over, order)
            mine = [x[p.rows].requires_grad_() for x in (q, k, v)]
            y = context_attention(*mine, p, limits=limits, method=method)
            (y * weight[p.rows]).sum().backward()
            out.append((p.rows, y.detach(), *(x.grad for x in mine)))
    return out


@pytest.mark.parametrize(
    ("cp", "kv_heads", "limited"),
    [(2, 2, [Limits()]), (4, 1, [Limits()]), (4, 4, [Limits()]), (4, 2, LIMITS)],
)
def test_split_attention_is_whole_attention(
    cp: int, kv_heads: int, limited: Sequence[Limits], ranks: Any
) -> None:
    results = ranks(cp, split_attention, cp, kv_heads, limited)
    for i, (lengths, limits) in enumerate((s, w) for s in STREAMS for w in limited for _ in range(4)):
        q, k, v, weight = inputs(sum(lengths), 4, kv_heads)
        whole = [x.requires_grad_() for x in (q, k, v)]
        y = attention(*whole, Packing.of(lengths), causal=True, limits=limits)
        (y * weight).sum().backward()
        expected = [y.detach(), *(x.grad for x in whole)]
        for rank in results:
            rows, *found = rank[i]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs[rows], rtol=1e-10, atol=1e-12)


def narrow_attention(cp: int) -> list[tuple[Any, ...]]:
    out = []
    for method in ("gather", "ring"):
        p: Any = pack([64], "cpu", axis(cp), "zigzag")
        q, k, v, weight = (x.bfloat16() for x in inputs(64, 4, 2))
        mine = [x[p.rows].requires_grad_() for x in (q, k, v)]
        y = context_attention(*mine, p, method=method)
        (y * weight[p.rows]).sum().backward()
        out.append((p.rows, y.detach(), *(x.grad for x in mine)))
    return out


def test_bfloat16_stays_bfloat16_and_close(ranks: Any) -> None:
    q, k, v, weight = (x.bfloat16().double() for x in inputs(64, 4, 2))
    whole = [x.requires_grad_() for x in (q, k, v)]
    y = attention(whole[0], whole[1], whole[2], Packing.of([64]), causal=True)
    (y * weight).sum().backward()
    expected = [y.detach(), *(x.grad for x in whole)]
    for rank in ranks(2, narrow_attention, 2):
        for rows, *found in rank:
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype == torch.bfloat16 and theirs is not None
                assert (ours.double() - theirs[rows]).abs().max() < 2e-2 * theirs.abs().max()


def test_blocks_without_a_fused_kernel() -> None:
    gen = torch.Generator().manual_seed(0)
    n = TILE + 77
    q, k, v, grad = (torch.randn(1, 2, n, 4, generator=gen, dtype=torch.float64) for _ in range(4))
    k, v = k[:, :1].expand_as(q), v[:, :1].expand_as(q)
    for scoring in (Scoring(0.3, last=0), Scoring(0.3)):
        rows = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]
        one = [rows[0], rows[1][:, :1], rows[2][:, :1]]
        out, lse = attend(*one, scoring)
        plain, plain_lse = tiled(q, k, v, scoring)
        torch.testing.assert_close(plain.squeeze(0).transpose(0, 1), out)
        torch.testing.assert_close(plain_lse.squeeze(0).T, lse)
        d_q, d_k, d_v = attend_backward(grad.squeeze(0).transpose(0, 1), *one, Attended(out, lse), scoring)
        p_q, p_k, p_v = tiled_backward(grad, q, k, v, Attended(plain, plain_lse), scoring)
        torch.testing.assert_close(p_q.squeeze(0).transpose(0, 1), d_q)
        torch.testing.assert_close(p_k.sum(1).transpose(0, 1), d_k)
        torch.testing.assert_close(p_v.sum(1).transpose(0, 1), d_v)


def shape_only(cp: int, order: Order, lengths: list[int]) -> Any:
    group: Any = object()
    return pack(lengths, "cpu", Axis("cp", cp, 0, group), order)


def test_only_documents_that_continue_move_keys() -> None:
    assert key_costs(shape_only(4, "contiguous", [4, 4, 4, 4]), 2, 8, 2)["gather"].forward == 0
    # The last of 4 ranks reads the 12 rows of the others, each 2 heads of a key and a value of 8 at 2 bytes.
    one = key_costs(shape_only(4, "contiguous", [16]), 2, 8, 2)
    assert (one["gather"].forward, one["ring"].backward) == (12 * 64, 2 * 12 * 64)
    assert one["ring"].held == 8 * 64
    # Zigzag: rank 0 ends the stream and misses what ranks 1 to 3 hold.
    assert key_costs(shape_only(4, "zigzag", [16]), 2, 8, 2)["gather"].forward == 12 * 64


def test_the_ring_is_taken_where_gathered_keys_would_outgrow_a_share() -> None:
    assert choose_attention_method(shape_only(2, "contiguous", [16]), 8, 2, 8, 2) == "gather"
    assert choose_attention_method(shape_only(2, "contiguous", [16]), 2, 2, 8, 2) == "gather"
    assert choose_attention_method(shape_only(16, "contiguous", [64]), 4, 2, 8, 2) == "ring"
    assert choose_attention_method(shape_only(16, "contiguous", [4] * 16), 4, 2, 8, 2) == "gather"
