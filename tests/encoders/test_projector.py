"""Projectors against plain formulas, whole and split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from encoders.projector import Projector, ProjectorKind
from encoders.share import Share
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes
from tests.encoders.helpers import make_axes

KINDS = [
    ProjectorKind(),
    ProjectorKind("mlp", "gelu", True, "none"),
    ProjectorKind("mlp", "gelu_tanh", True, "layer"),
    ProjectorKind("linear", bias=True, norm="none"),
    ProjectorKind("linear", norm="layer"),
]
ACTS: dict[str, Any] = {
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def made(kind: ProjectorKind, axes: Axes) -> Projector:
    """With weights that depend on names alone, sharded over tp."""
    net = Projector((6, 8, 10), axes, kind, device=None, dtype=torch.float64)
    initialise(net, 3, "p")
    for name, p, spec in declared(net):
        if name in ("bias", "norm_bias", "up.bias", "linear.bias"):
            p.data.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64))
        if spec.shard_dim is not None and axes.tp.size > 1:
            p.data = p.data.chunk(axes.tp.size, spec.shard_dim)[axes.tp.rank].clone()
    return net


def formula(kind: ProjectorKind, w: dict[str, Tensor], x: Tensor) -> Tensor:
    if kind.norm == "rms":
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm"]
    if kind.norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm"] + w["norm_bias"]
    if kind.kind == "linear":
        return x @ w["linear.weight"].T + w.get("linear.bias", 0.0)
    h = ACTS[kind.activation](x @ w["up.weight"].T + w.get("up.bias", 0.0))
    return h @ w["down.weight"].T + w.get("bias", 0.0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_projector_is_its_formula(kind: ProjectorKind) -> None:
    net = made(kind, Axes())
    x = torch.randn(5, 6, dtype=torch.float64)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    assert torch.allclose(net(x, Share.of([5], Axes())), formula(kind, weights, x), atol=1e-12)
    biased = {n for n in weights if n.endswith("bias")} - {"norm_bias"}
    assert bool(biased) == kind.bias


def split_error() -> float:
    """Largest error of outputs over all kinds, with sequence parallelism and without."""
    worst = 0.0
    for together in (False, True):
        axes = make_axes(1, 2, together)
        for kind in KINDS:
            whole, net = made(kind, Axes()), made(kind, axes)
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            share = Share.of([7], axes)
            expected = whole(x, Share.of([7], Axes()))
            found = net(x[slice(*share.part)], share)
            worst = max(worst, float((found - expected[slice(*share.part)]).abs().max()))
    dist.barrier()
    return worst


def test_a_split_projector_is_the_whole(ranks: Any) -> None:
    assert max(ranks(2, split_error)) < 1e-12


def test_none_needs_equal_widths() -> None:
    x = torch.randn(2, 6)
    assert Projector((6, 1, 6), Axes(), ProjectorKind("none"))(x, Share.of([2], Axes())) is x
    with pytest.raises(
        ValueError, match="features are 6 wide and the language model 10; needed: kind=linear"
    ):
        Projector((6, 1, 10), Axes(), ProjectorKind("none"))
