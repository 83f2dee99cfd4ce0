"""Adopted modules keep their values, buffers and ties in every layout, and learn as the whole does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.sharding.adopt import adopt
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.optim import ShardedOptimizer
from parallel.sharding.param import (
    ParamSpec,
    constant,
    declare,
    declare_buffer,
    declared,
    initialise,
    local,
    seeded,
)
from parallel.sharding.rules import AdamW
from parallel.sharding.shard import ShardPolicy, materialise, shard_module
from parallel.topology.layout import make_layout
from parallel.topology.mesh import build_mesh


class Plain(nn.Module):
    """An ordinary module: plain parameters, a scalar, a tied one, one that is not trained, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)
        self.again = nn.Linear(5, 7, bias=False)
        self.again.weight = self.up.weight
        self.gate = self.again.gate = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("order", torch.arange(5).flip(0).expand(1, -1), persistent=False)
        self.register_buffer("same", self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, self.order[0]] * self.scale + self.shift
        return x + self.gate * self.again.gate * self.down(torch.tanh(self.up(x) + self.again(x)))


class Net(nn.Module):
    """Declared and adopted parameters, and buffers made on the meta device.

    partial: its tp ranks see different tokens.
    """

    def __init__(self, device: str | None, *, partial: bool = False) -> None:
        super().__init__()
        factory: FactoryKwargs = {"device": device, "dtype": torch.float64}
        self.inner = adopt(Plain(), partial=partial, **factory)
        declare(self, "out", (5,), ParamSpec(constant(2.0), partial=partial), **factory)
        declare_buffer(self, "ones", (3,), 1.0, **factory)
        self.register_buffer("steps", torch.arange(5, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * local(self.out) + self.steps


def whole() -> Net:
    with seeded("net", 3):
        net = Net(None)
    initialise(net, 3, "net")
    return net


def tokens() -> torch.Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def learn(spec: dict[str, Any], layers: bool) -> dict[str, Any]:
    """Three steps of a sharded net and of the whole one: what was kept, and the largest relative error."""
    layout = make_layout("net", dist.get_world_size(), spec)
    mesh = build_mesh(layout, "cpu")
    assert mesh is not None
    partial = layout.sequence_parallel
    torch.manual_seed(dist.get_rank())  # ranks have drawn other numbers before
    with seeded("net", 3):
        net = Net("meta", partial=partial)
    wrapped = [net.inner] if layers else []
    shard_module(net, mesh, ShardPolicy(wrapped), param_dtype=torch.float64)
    materialise(
        net, mesh, seed=3, name="net", device=torch.device("cpu"), again=lambda: Net("cpu", partial=partial)
    )
    one, x = whole(), tokens()
    out: dict[str, Any] = {
        "buffers": [torch.equal(a, b) for a, b in zip(net.buffers(), one.buffers(), strict=True)]
    }
    out["tied"] = net.inner.scale is net.inner.same and net.inner.up.weight is net.inner.again.weight
    out["tied"] &= net.inner.gate is net.inner.again.gate
    out["kept"] = [name for name, _, s in declared(net) if s.init is not None]
    ranks = dist.get_world_size() if partial else mesh.data.size()
    mine = x.chunk(ranks)[dist.get_rank() if partial else mesh.data.get_local_rank()]
    ours, theirs = (
        ShardedOptimizer([net], mesh, AdamW()),
        torch.optim.AdamW(
            [
                {
                    "params": [p for p in one.parameters() if p.ndim > 1 and p.requires_grad],
                    "weight_decay": 0.1,
                },
                {
                    "params": [p for p in one.parameters() if p.ndim <= 1 and p.requires_grad],
                    "weight_decay": 0.0,
                },
            ],
            betas=(0.9, 0.95),
        ),
    )
    worst = 0.0
    for _ in range(3):
        net(mine).square().sum().backward()
        one(x).square().sum().backward()
        ours.collect()
        square = ours.norm_squared()
        dist.all_reduce(square)
        grads = [p.grad for p in one.parameters() if p.grad is not None]
        expected = sum(float(g.square().sum()) for g in grads)
        worst = max(worst, abs(float(square) - expected) / expected)
        ours.step(0.1)
        for group in theirs.param_groups:
            group["lr"] = 0.1
        theirs.step()
        theirs.zero_grad()
    ends = dict(one.named_parameters())
    for name, p in net.named_parameters():
        full = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        worst = max(worst, float((full - ends[name].detach()).abs().max()))
    mesh.close()
    return {**out, "worst": worst, "names": sorted(ends) == sorted(n for n, _ in net.named_parameters())}


@pytest.mark.parametrize(
    "world, spec, layers",
    [
        (1, {}, False),
        (3, {}, True),
        (4, {"tp": 2}, False),
        (4, {"tp": 2, "sequence_parallel": True}, True),
    ],
)
def test_an_adopted_module_learns_as_one(world: int, spec: dict[str, Any], layers: bool, ranks: Any) -> None:
    for found in ranks(world, learn, spec, layers):
        assert all(found["buffers"]) and found["tied"] and found["names"]
        assert found["kept"] == ["out"]
        assert found["worst"] < 1e-12


def without_a_value() -> None:
    mesh = build_mesh(make_layout("net", 1, {}), "cpu")
    assert mesh is not None
    net = nn.Sequential(adopt(nn.Linear(2, 2), device="meta"))
    net.register_buffer("steps", torch.arange(5, device="meta"))
    shard_module(net, mesh, ShardPolicy(), param_dtype=torch.float32)
    try:
        materialise(net, mesh, seed=0, name="net", device=torch.device("cpu"))
    finally:
        mesh.close()


def test_a_buffer_without_a_value_is_named(ranks: Any) -> None:
    with pytest.raises(AssertionError, match=r"buffer steps was made on the meta device.*declare_buffer"):
        ranks(1, without_a_value)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (nn.Linear(2, 2, device="meta"), "parameter weight of Linear is on the meta device"),
        (nn.LazyLinear(2), "parameter weight of LazyLinear has no shape before its first batch"),
        (nn.Sequential(nn.Dropout(0.1)), r"Sequential\.0 drops values at random \(p=0\.1\)"),
        (nn.MultiheadAttention(4, 2, dropout=0.2), r"MultiheadAttention drops values at random \(p=0\.2\)"),
        (nn.BatchNorm1d(3), r"batch norm .* needed: eval\(\)"),
        (lambda: nn.Linear(2, 2), "needs key="),
    ],
)
def test_what_cannot_be_adopted_is_refused_in_words(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adopt(made)


def test_what_is_adopted_in_eval_mode_or_without_chance_is_taken() -> None:
    for made in (nn.Dropout(0.0), nn.BatchNorm1d(3).eval(), nn.Dropout(0.1).eval()):
        assert adopt(made) is made


def test_dtypes_of_an_adopted_module() -> None:
    made = nn.Module()
    made.weight, made.index = nn.Parameter(torch.rand(3)), nn.Parameter(torch.arange(2), requires_grad=False)
    made.register_buffer("exact", torch.rand(3, dtype=torch.float64))
    made.register_buffer("count", torch.arange(2))
    values = {name: t.clone() for name, t in [*made.named_parameters(), *made.named_buffers()]}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        adopt(made, dtype=dtype)
        assert made.exact.dtype == torch.float64 and made.count.dtype == made.index.dtype == torch.int64
        assert all(torch.equal(t, values[name]) for name, t in made.named_buffers())
    assert made.weight.dtype == torch.float32  # it was declared already


def test_a_key_decides_what_is_drawn() -> None:
    def draw(key: str, before: int) -> torch.Tensor:
        with seeded("module", 5):
            torch.rand(before)
            return adopt(lambda: nn.Linear(2, 2), key=key).weight.detach()

    assert torch.equal(draw("a", 0), draw("a", 7)) and not torch.equal(draw("a", 0), draw("b", 0))
