"""What a layer keeps for its backward falls as 1 / cp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm.layer import Layer
from llm.moe import ForwardContext
from parallel.context_parallel import ContextPacking, pack
from parallel.context_parallel.attention import choose_attention_method, key_costs
from parallel.sequence.stream import Order
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes, Axis
from tests.llm.harness import tiny

CFG = tiny(
    n_heads=2, n_kv_heads=2, head_dim=8, mamba_heads=4, mamba_head_dim=8, mamba_state=8, mamba_groups=2,
    chunk=64, n_experts=4, top_k=2, expert_ffn=8, mlp_ffn=256, init_std=0.02,
)  # fmt: skip
TOKENS = 1 << 12


def kept(cp: int, symbol: str, order: Order) -> tuple[int, str]:
    """(bytes of the distinct tensors that a layer saves for its backward over one document of TOKENS,
    attention's method)."""
    axis = Axis("cp", cp, dist.get_rank(), dist.group.WORLD) if cp > 1 else Axis.single("cp")
    layer = Layer(symbol, CFG, Axes(cp=axis), device=None, dtype=torch.float32)
    initialise(layer, 0, "layer")
    packing = pack([TOKENS], "cpu", axis, order)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(packing.total, CFG.d_model, generator=gen).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x, ForwardContext(packing, packing.total))
        total = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in own)
    y.sum().backward()
    chosen = (
        [method for method in packing.memo.values() if isinstance(method, str)]
        if isinstance(packing, ContextPacking)
        else []
    )
    return total, chosen[0] if symbol == "*" and chosen else ""


def all_kinds(cp: int) -> list[tuple[int, str]]:
    torch.manual_seed(0)
    return [kept(cp, symbol, order) for symbol in "M*E-" for order in ("contiguous", "zigzag")]


def test_activations_fall_as_one_over_cp(ranks: Any) -> None:
    alone = all_kinds(1)
    for cp in (2, 4):
        for result in ranks(cp, all_kinds, cp):
            for i, ((whole, _), (part, _)) in enumerate(zip(alone, result, strict=True)):
                # A gather keeps others' keys, up to as much as the rank's own queries and outputs.
                gathers = i in (2, 3) and cp == 2
                assert part < (1.7 if gathers else 1.2) * whole / cp, (cp, "MM**EE--"[i], part, whole)
            assert result[2][1] == ("gather" if cp == 2 else "ring")


def test_only_the_ring_bounds_the_keys_of_many_ranks() -> None:
    group: Any = object()
    held = []
    for cp in (8, 64):
        packing = pack([1 << 20], "cpu", Axis("cp", cp, 0, group), "zigzag")
        assert isinstance(packing, ContextPacking)
        assert choose_attention_method(packing, 4, 2, 8, 2) == "ring"
        held.append(key_costs(packing, 2, 8, 2)["ring"].held)
    assert held[0] == pytest.approx(8 * held[1])
