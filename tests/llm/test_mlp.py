"""Activations and the dense MLP by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.mlp import MLP, MLPShape, activate
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes

BY_HAND: dict[str, Any] = {"relu2": lambda x: F.relu(x) * F.relu(x), "gelu": F.gelu, "silu": F.silu}


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations(kind: Any, gated: bool, dtype: torch.dtype) -> None:
    """Values and gradients; the squared ReLU's, which is made of its output, to the last bit."""
    gen = torch.Generator().manual_seed(0)
    up, gate, weight = (torch.randn(3, 4096, generator=gen) * 8.0).to(dtype)
    up[:5] = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e4], dtype=dtype)
    found = []
    for own in (True, False):
        args = [t.clone().requires_grad_() for t in ((up, gate) if gated else (up,))]
        if own:
            y = activate(kind, *args)
        else:
            y = BY_HAND[kind](args[1]) * args[0] if gated else BY_HAND[kind](args[0])
        found.append([y, *torch.autograd.grad((y * weight).sum(), args)])
    for ours, theirs in zip(*found, strict=True):
        if kind == "relu2" and not gated:
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_by_hand(bias: bool) -> None:
    shape = MLPShape(6, 10, std=0.5, out_std=0.4, activation="silu", gated=True, bias=bias)
    mlp = MLP(shape, Axes(), device=None, dtype=torch.float64)
    initialise(mlp, 1, "mlp")
    with torch.no_grad():
        for name, p in mlp.named_parameters():
            if "bias" in name:
                p.copy_(torch.arange(len(p)))
    x = torch.randn(7, 6, dtype=torch.float64)

    def plus(name: str) -> Tensor | float:
        return mlp.get_parameter(name) if bias else 0.0

    assert mlp.gate is not None
    gate, up = x @ mlp.gate.weight.T + plus("gate.bias"), x @ mlp.up.weight.T + plus("up.bias")
    expected = (F.silu(gate) * up) @ mlp.down.weight.T + plus("bias")
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
