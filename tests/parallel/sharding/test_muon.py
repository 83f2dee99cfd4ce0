"""Muon learns the same in any layout, and what Muon elsewhere learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.sharding import (
    AdamW,
    FactoryKwargs,
    Muon,
    ParamSpec,
    ShardedOptimizer,
    ShardPolicy,
    declare,
    declared,
    global_index,
    held_indices,
    initialise,
    materialise,
    normal,
    shard_module,
)
from parallel.sharding.muon import ADAM_RMS, QUINTIC, orthogonalise
from parallel.topology.data_parallel import Shards
from parallel.topology.layout import make_layout
from parallel.topology.mesh import build_mesh

LR = 0.02
HYPER = Muon(momentum=0.9, steps=5, rest=AdamW(weight_decay=0.1))


class Experts(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        factory: FactoryKwargs = {"device": device, "dtype": torch.float64}
        up = ParamSpec(normal(1.0), view="expert", shard_dim=0, etp_dim=1)
        declare(self, "up", (4, 6, 10), up, **factory)
        down = ParamSpec(normal(1.0), view="expert", shard_dim=0, etp_dim=2)
        declare(self, "down", (4, 10, 6), down, **factory)


class Net(nn.Module):
    """Matrices sharded by rows, by columns, not at all, uneven, of experts; and what is no matrix."""

    def __init__(self, device: str) -> None:
        super().__init__()
        factory: FactoryKwargs = {"device": device, "dtype": torch.float64}
        declare(self, "row", (8, 12), ParamSpec(normal(1.0), shard_dim=0), **factory)
        declare(self, "column", (5, 8), ParamSpec(normal(1.0), shard_dim=1), **factory)
        declare(self, "both", (8, 7), ParamSpec(normal(1.0), shard_dim=0), **factory)
        declare(self, "uneven", (7, 3), normal(1.0), **factory)
        declare(self, "table", (8, 4), ParamSpec(normal(1.0), shard_dim=0, matrix=False), **factory)
        declare(self, "vector", (8,), ParamSpec(normal(1.0), shard_dim=0), **factory)
        self.experts = Experts(device)


def gradients(step: int) -> dict[str, Tensor]:
    """A gradient of each parameter of Net; in step 1 the column has none."""
    g = torch.Generator().manual_seed(step)
    made = {
        k: torch.randn(p.shape, generator=g, dtype=torch.float64) for k, p in Net("cpu").named_parameters()
    }
    return {k: v for k, v in made.items() if step != 1 or k != "column"}


def straight(rate: dict[str, float]) -> dict[str, Tensor]:
    """Three updates of the whole, a matrix at a time."""
    net = Net("cpu")
    initialise(net, 3, "net")
    values = {k: p.detach() for k, p in net.named_parameters()}
    momentum = {k: torch.zeros_like(v) for k, v in values.items()}
    rest = [nn.Parameter(values[k]) for k in ("table", "vector")]
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0, "lr": LR * rate.get(k, 1.0)}
        for k, p in zip(("table", "vector"), rest, strict=True)
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        given = gradients(step)
        for k, w in values.items():
            if k in ("table", "vector") or k not in given:
                continue
            momentum[k] = 0.9 * momentum[k] + given[k]
            ahead = given[k] + 0.9 * momentum[k]
            for one, wanted in zip(w.view(-1, *w.shape[-2:]), ahead.view(-1, *w.shape[-2:]), strict=True):
                x = wanted / (wanted.norm() + 1e-7)
                a, b, c = QUINTIC
                for _ in range(5):  # on singular values alone: a s + b s^3 + c s^5
                    u, s, v = torch.linalg.svd(x, full_matrices=False)
                    x = u @ torch.diag(a * s + b * s**3 + c * s**5) @ v
                lr = LR * rate.get(k, 1.0)
                one.mul_(1 - lr * 0.1).sub_(lr * ADAM_RMS * max(one.shape) ** 0.5 * x)
        for k, p in zip(("table", "vector"), rest, strict=True):
            p.grad = given[k]
        adam.step()
    return values


def trained(spec: dict[str, Any], shards: Shards | None, rate: dict[str, float]) -> float:
    """Largest difference of this rank's shards from the whole after three updates."""
    layout = make_layout("net", torch.distributed.get_world_size(), spec)
    mesh = build_mesh(layout, "cpu", shards=shards)
    assert mesh is not None
    net = Net("meta")
    shard_module(net, mesh, ShardPolicy(), param_dtype=torch.float64)
    materialise(net, mesh, seed=3, name="net", device=torch.device("cpu"))
    optimizer = ShardedOptimizer([net], mesh, HYPER, rate=lambda name: rate.get(name, 1.0))
    index = {
        k: global_index(tuple(p.shape), held_indices(tuple(p.shape), spec, mesh))
        for k, p, spec in declared(net)
    }
    params = dict(net.named_parameters())
    for step in range(3):
        for k, g in gradients(step).items():
            like = params[k]
            like.grad = torch.distributed.tensor.DTensor.from_local(
                g.reshape(-1)[index[k]],
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        optimizer.collect()
        optimizer.step(LR)
    whole = straight(rate)
    worst = [
        (params[k].detach().to_local() - whole[k].reshape(-1)[index[k]]).abs().max()
        for k in params
        if index[k].numel()
    ]
    mesh.close()
    return float(max(worst))


LAYOUTS: list[tuple[int, dict[str, Any], Shards | None]] = [
    (1, {}, None),
    (3, {}, None),
    (4, {"tp": 2}, None),
    (4, {"tp": 4, "ep": 2, "etp": 2}, None),
    (4, {"tp": 2, "ep": 2}, Shards(1, 1)),
    (4, {"etp": 2}, Shards(2, 2)),
    (4, {}, Shards(1, 1)),
]


@pytest.mark.parametrize(("world", "spec", "shards"), LAYOUTS)
def test_any_layout_learns_what_the_whole_learns(
    world: int, spec: dict[str, Any], shards: Shards | None, ranks: Any
) -> None:
    assert max(ranks(world, trained, spec, shards, {"row": 0.1, "vector": 3.0})) < 1e-9


def test_singular_values_end_near_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    for shape in ((5, 9), (9, 5), (3, 8, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        y = orthogonalise(x, 5)
        assert y.shape == x.shape
        assert ((s := torch.linalg.svdvals(y)) > 0.3).all() and (s < 1.3).all()
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        turned = u.mT @ y @ v.mT
        assert torch.allclose(turned, torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1)), atol=1e-9)


def test_torch_s_muon_learns_the_same_to_its_rounding() -> None:
    torch.manual_seed(1)
    start = torch.randn(24, 16)
    theirs = nn.Parameter(start.clone())
    peer = torch.optim.Muon([theirs], lr=LR, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    momentum, w = torch.zeros_like(start), start.clone()
    for step in range(4):
        grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        theirs.grad = grad.clone()
        peer.step()
        # torch keeps an average where the paper keeps a sum; a factor does not change what is orthogonalised.
        momentum = 0.9 * momentum + grad
        w = w * (1 - LR * 0.1) - LR * ADAM_RMS * 24**0.5 * orthogonalise(grad + 0.9 * momentum, 5)
    moved = (theirs.detach() - start).norm()
    assert (theirs.detach() - w).norm() < 0.05 * moved
