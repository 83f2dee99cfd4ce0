"""Mamba under context parallelism: by states and by heads, costs, and documents given part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm.mamba import Mamba, MixerShape, choose_scan_method, mixer_bytes
from parallel.context_parallel import ContextPacking, pack
from parallel.sequence.packed import Packing
from parallel.sequence.stream import Order
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes, Axis
from tests.llm.harness import tiny

CFG = tiny(d_model=8, mamba_head_dim=3, mamba_state=4, mamba_groups=2, chunk=4, init_std=0.3)
# 16 tokens on 4 ranks in zigzag are pieces of 2, shorter than the convolution reaches.
STREAMS = [(16,), (1, 2, 5, 1, 7), (7, 0, 9), (2,) * 8, (40, 8)]


def mixer(axes: Axes) -> Mamba:
    out = Mamba(CFG, axes, device=None, dtype=torch.float64)
    initialise(out, 5, "mixer")
    return out


def inputs(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(sum(lengths))
    x, weight = torch.randn(2, sum(lengths), CFG.d_model, generator=gen, dtype=torch.float64)
    return x, weight


def grads(m: Mamba) -> dict[str, Tensor]:
    out = {}
    for name, p, _ in declared(m):
        assert p.grad is not None, name
        out[name] = p.grad
    return out


def by_method(cp: int) -> list[tuple[Any, ...]]:
    out: list[tuple[Any, ...]] = []
    axis = Axis("cp", cp, dist.get_rank(), dist.group.WORLD)
    for lengths in STREAMS:
        x, weight = inputs(lengths)
        for order in ("contiguous", "zigzag"):
            for method in ("states", "heads"):
                m = mixer(Axes(cp=axis))
                m._method = lambda *_, how=method: how  # type: ignore[method-assign, misc]
                p = pack(lengths, "cpu", axis, order)
                assert isinstance(p, ContextPacking)
                mine = x[p.rows].requires_grad_()
                y = m(mine, p)
                (y * weight[p.rows]).sum().backward()
                out.append((p.rows, y.detach(), mine.grad, grads(m)))
    return out


@pytest.mark.parametrize("cp", [2, 4])
def test_both_methods_are_the_whole_mixer(cp: int, ranks: Any) -> None:
    results = ranks(cp, by_method, cp)
    for k, lengths in enumerate(STREAMS):
        x, weight = inputs(lengths)
        m = mixer(Axes())
        x.requires_grad_()
        y = m(x, Packing.of(lengths))
        (y * weight).sum().backward()
        assert x.grad is not None
        expected = grads(m)
        for i in range(4 * k, 4 * k + 4):
            for rank in results:
                rows, ours, d_x, _ = rank[i]
                torch.testing.assert_close(ours, y[rows].detach(), rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(d_x, x.grad[rows], rtol=1e-9, atol=1e-11)
            for name, theirs in expected.items():
                total = torch.stack([rank[i][3][name] for rank in results]).sum(0)
                torch.testing.assert_close(total, theirs, rtol=1e-9, atol=1e-10, msg=f"{name} {lengths} {i}")


def test_a_document_given_part_by_part_is_the_whole_document() -> None:
    x, weight = inputs((37,))
    results = []
    for parts in ([37], [1, 1, 15, 20], [2, 35]):
        m, mine = mixer(Axes()), x.clone().requires_grad_()
        carry, out = None, []
        for part in mine.split(parts):
            y, carry = m.resume(part, carry)
            out.append(y)
        y = torch.cat(out)
        (y * weight).sum().backward()
        results.append({"y": y.detach(), "x": mine.grad, **grads(m)})
    m, mine = mixer(Axes()), x.clone().requires_grad_()
    y = m(mine, Packing.of([37]))
    (y * weight).sum().backward()
    results.append({"y": y.detach(), "x": mine.grad, **grads(m)})
    for other in results[1:]:
        for name, t in results[0].items():
            torch.testing.assert_close(other[name], t, rtol=1e-9, atol=1e-11, msg=name)


def shape_only(cp: int, order: Order, lengths: list[int]) -> ContextPacking:
    group: Any = object()
    out = pack(lengths, "cpu", Axis("cp", cp, 0, group), order)
    assert isinstance(out, ContextPacking)
    return out


# Nemotron 3 Nano's mixer at tp 1: a state is 64 heads of 64 x 128.
NANO = MixerShape(heads=64, head_dim=64, groups=8, state=128, kernel=4)


def test_bytes_of_states_do_not_grow_with_length() -> None:
    one = 64 * (64 * 128 + 1) * 4
    channels = 64 * 64 + 2 * 8 * 128
    for tokens in (1 << 13, 1 << 20):
        costs = mixer_bytes(NANO, shape_only(8, "contiguous", [tokens]), 2)
        # The last of 8 ranks gets 7 states and 3 rows before its piece.
        assert costs["states"] == 7 * one + 3 * channels * 2
        # 7 / 8 of the tokens of an eighth of x, B, C and dt, and back as many results in float32.
        assert costs["heads"] == tokens * 7 // 8 * ((8 * 65 + 2 * 128) * 2 + 8 * 64 * 4)
    assert mixer_bytes(NANO, shape_only(8, "contiguous", [1024] * 8), 2)["states"] == 0


def test_the_method_that_moves_fewer_bytes_is_taken() -> None:
    assert choose_scan_method(NANO, shape_only(8, "contiguous", [1 << 20]), 2) == "states"
    assert choose_scan_method(NANO, shape_only(8, "contiguous", [1 << 10]), 2) == "heads"
    # 3 ranks do not divide 64 heads.
    assert choose_scan_method(NANO, shape_only(3, "contiguous", [3 << 8]), 2) == "states"
