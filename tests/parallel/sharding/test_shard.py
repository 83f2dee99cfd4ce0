"""Shards hold exactly their part of the initial weights, and update as the whole would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.sharding import (
    AdamW,
    FactoryKwargs,
    ParamSpec,
    ShardedOptimizer,
    ShardPolicy,
    constant,
    declare,
    declare_buffer,
    declared,
    global_index,
    held_indices,
    initialise,
    materialise,
    normal,
    shard_module,
)
from parallel.topology.layout import make_layout
from parallel.topology.mesh import ModuleMesh, build_mesh


class Experts(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        factory: FactoryKwargs = {"device": device, "dtype": torch.float64}
        declare(self, "up", (4, 6, 10), ParamSpec(normal(1.0), view="expert", shard_dim=0), **factory)


class Net(nn.Module):
    """Parameters of all kinds: sharded by rows, by columns, not at all, uneven, experts."""

    def __init__(self, device: str) -> None:
        super().__init__()
        factory: FactoryKwargs = {"device": device, "dtype": torch.float64}
        declare(self, "row", (8, 12), ParamSpec(normal(1.0), shard_dim=0), **factory)
        declare(self, "column", (5, 8), ParamSpec(normal(1.0), shard_dim=1), **factory)
        declare(self, "vector", (8,), ParamSpec(normal(1.0), shard_dim=0), **factory)
        declare(self, "uneven", (7, 3), normal(1.0), **factory)
        declare(self, "one", (1,), constant(2.0), **factory)
        self.experts = Experts(device)
        declare_buffer(self, "count", (3,), 2.5, device=device)
        self.register_buffer("order", torch.arange(3, 0, -1))


def whole_values() -> dict[str, torch.Tensor]:
    net = Net("cpu")
    initialise(net, 3, "net")
    return {k: p.detach() for k, p in net.named_parameters()}


def held_index(net: nn.Module, mesh: ModuleMesh) -> dict[str, torch.Tensor]:
    """Linear indices of the elements of each parameter that this rank holds, in the shape of its shard."""
    return {
        key: global_index(tuple(p.shape), held_indices(tuple(p.shape), spec, mesh))
        for key, p, spec in declared(net)
    }


def difference(net: nn.Module, whole: dict[str, torch.Tensor], index: dict[str, torch.Tensor]) -> float:
    """Largest difference between this rank's shards and the same elements of the whole."""
    worst = 0.0
    for key, p in net.named_parameters():
        shard, part = p.detach().to_local(), whole[key].reshape(-1)[index[key]]
        assert shard.shape == part.shape, key
        worst = max(worst, float((shard - part).abs().max()) if shard.numel() else 0.0)
    return worst


def check_cover(net: nn.Module, index: dict[str, torch.Tensor]) -> None:
    """Every element is held somewhere, and all of a parameter's elements equally often."""
    for key, p in net.named_parameters():
        held = torch.bincount(index[key].reshape(-1), minlength=p.numel())
        dist.all_reduce(held)
        assert held.min() == held.max() >= 1, (key, held)


def shards(spec: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of the weights before and after two updates, and of the gradient norm."""
    layout = make_layout("net", dist.get_world_size(), spec)
    mesh = build_mesh(layout, "cpu")
    assert mesh is not None
    net, whole = Net("meta"), whole_values()
    shard_module(net, mesh, ShardPolicy(), param_dtype=torch.float64)
    materialise(net, mesh, seed=3, name="net", device=torch.device("cpu"))
    index = held_index(net, mesh)
    worst = difference(net, whole, index)
    assert net.get_buffer("count").tolist() == [2.5] * 3 and net.get_buffer("order").tolist() == [3, 2, 1]
    optimizer = ShardedOptimizer([net], mesh, AdamW())
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in whole.values() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in whole.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )
    norm = 0.0
    for _ in range(2):
        for key, p in net.named_parameters():
            p.grad = p.detach() * 0.5
            whole[key].grad = whole[key] * 0.5
        optimizer.collect()
        square = optimizer.norm_squared()
        dist.all_reduce(square)
        expected = sum(float(p.grad.square().sum()) for p in whole.values())
        norm = max(norm, abs(float(square) - expected) / expected)
        optimizer.step(0.1)
        reference.step()
    worst = max(worst, difference(net, whole, index))
    check_cover(net, index)
    mesh.close()
    return worst, norm


LAYOUTS = [
    (1, {}),
    (2, {}),
    (3, {}),
    (4, {}),
    (4, {"tp": 2}),
    (4, {"tp": 4}),
    (4, {"tp": 2, "ep": 4}),
    (4, {"ep": 2}),
]


@pytest.mark.parametrize("world, spec", LAYOUTS)
def test_shards_are_parts_of_the_whole(world: int, spec: dict[str, Any], ranks: Any) -> None:
    for worst, norm in ranks(world, shards, spec):
        assert worst < 1e-12 and norm < 1e-12


def indivisible() -> None:
    mesh = build_mesh(make_layout("net", 3, {"tp": 3}), "cpu")
    assert mesh is not None
    shard_module(Net("meta"), mesh, ShardPolicy(), param_dtype=torch.float64)


def test_a_dim_that_does_not_divide_is_named(ranks: Any) -> None:
    with pytest.raises(AssertionError, match=r"Net\.row of shape \[8, 12\]: dim 0 does not divide by tp=3"):
        ranks(3, indivisible)
