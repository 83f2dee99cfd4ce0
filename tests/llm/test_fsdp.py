"""Weights, gradients and updates sharded over data: every layer and ZeRO stage, paired with every degree.

Both views are covered: dense weights over dp and cp, experts over the ranks that ep and etp leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llm.config import LLMConfig
from llm.model import LLM
from parallel.sharding.optim import ShardedOptimizer
from parallel.sharding.param import declared, global_index, local
from parallel.sharding.rules import AdamW
from parallel.sharding.shard import ShardPolicy, held_indices, materialise, shard_module
from parallel.topology.axis import Axes
from parallel.topology.mesh import ModuleMesh, build_mesh
from parallel.topology.stage import Stage
from tests.llm.degrees import Degrees
from tests.llm.test_whole import MODEL, build, own_share, stream
from tests.slow import on_demand

MICROBATCHES = 2

# ZeRO stages (arXiv 1910.02054): all shard the optimizer's state over data, 2 and 3 gradients, 3 weights too.
# In 1, gradients stay whole until the last micro-batch.
Zero = Literal[1, 2, 3]


@dataclass(frozen=True)
class Case:
    """A model, its layout, and how its weights are held over data."""

    cfg: LLMConfig
    degrees: Degrees
    zero: Zero


def only(symbol: str) -> LLMConfig:
    """Embedding, one layer and head."""
    weights = {} if "E" in symbol else {"aux_weight": 0.0, "z_weight": 0.0}
    return replace(MODEL, pattern=symbol, mtp_layers=0, **weights)


def stream_of(dp: int, microbatch: int) -> int:
    """Which stream a data-parallel rank computes."""
    return MICROBATCHES * dp + microbatch


def sharded(case: Case, mesh: ModuleMesh) -> LLM:
    """This rank's shards, with the initial weights of `build`."""
    model = LLM(case.cfg, mesh.axes, device="meta", dtype=torch.float64)
    mtp = [] if model.mtp is None else list(model.mtp.layers)
    layers = [*model.layers, *mtp] if case.zero == 3 else []
    shard_module(model, mesh, ShardPolicy(layers), param_dtype=torch.float64)
    materialise(model, mesh, seed=3, name="llm", device=torch.device("cpu"))
    for moe in model.moe_layers():
        moe.expert_bias.copy_(0.2 * torch.cos(torch.arange(case.cfg.n_experts)))
    return model


def weights_held(model: LLM) -> int:
    """Elements of the layers' weights that exist on this rank now."""
    return sum(local(p).numel() for layer in model.layers for p in layer.parameters())


def run_case(case: Case, mesh: ModuleMesh) -> dict[str, Any]:
    """This rank's gradients of two micro-batches, the indices of their elements, and sizes held over time."""
    model = sharded(case, mesh)
    assert isinstance(model, FSDPModule)
    optimizer = ShardedOptimizer([model], mesh, AdamW())
    sizes = {"start": weights_held(model)}
    coord = case.degrees.layout.coord(dist.get_rank())
    for i in range(MICROBATCHES):
        last = i == MICROBATCHES - 1
        model.set_requires_gradient_sync(case.zero > 1 or last)
        model.set_is_last_backward(case.zero > 1 or last)
        batch, weight = stream(stream_of(coord.dp, i), case.degrees.step, case.cfg)
        share, rows = own_share(batch, mesh.axes, case.degrees, case.cfg)
        loss = model(share, {})
        sizes["forward"] = weights_held(model)
        (loss * weight[rows]).sum().backward()
        if not last:
            sizes["gradients"] = sum(local(p.grad).numel() for p in model.parameters() if p.grad is not None)
    sizes["end"] = weights_held(model)
    optimizer.collect()
    grads, held = {}, {}
    for name, p, spec in declared(model):
        assert p.grad is not None, name
        grads[name] = local(p.grad).clone()
        held[name] = held_indices(tuple(p.shape), spec, mesh)
    return {"grads": grads, "held": held, "sizes": sizes}


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    meshes: dict[Degrees, ModuleMesh] = {}
    out = []
    for case in cases:
        d = case.degrees
        if d not in meshes:
            mesh = build_mesh(d.layout, "cpu")
            assert mesh is not None
            meshes[d] = mesh
        out.append(run_case(case, meshes[d]))
    for mesh in meshes.values():
        mesh.close()
    return out


def whole_gradients(cfg: LLMConfig, dp: int, step: int) -> dict[str, Tensor]:
    (model,) = build(cfg, Axes(), (Stage(0, len(cfg.symbols)),))
    for at in range(dp):
        for i in range(MICROBATCHES):
            batch, weight = stream(stream_of(at, i), step, cfg)
            (model(batch, {}) * weight).sum().backward()
    return {name: p.grad for name, p, _ in declared(model)}


def check(case: Case, results: list[dict[str, Any]]) -> None:
    """Every rank's shard of every gradient equals the same elements in one process."""
    dp = case.degrees.layout.dp
    whole = whole_gradients(case.cfg, dp, case.degrees.step)
    for result in results:
        for name, grad in result["grads"].items():
            expected = whole[name]
            for dim, index in enumerate(result["held"][name]):
                expected = expected.index_select(dim, index)
            if grad.numel():
                scale = float(whole[name].abs().max())
                assert float((grad - expected).abs().max()) <= 1e-9 * max(scale, 1e-3), (name, case)
    for name, grad in whole.items():
        held = [global_index(tuple(grad.shape), r["held"][name]).flatten() for r in results]
        assert len(torch.cat(held).unique()) == grad.numel(), (name, case)  # every element is somewhere


PAIRS = [
    Degrees(2),
    Degrees(2, cp=2),
    Degrees(2, ep=2),
    Degrees(4, ranks=(2, 0, 3, 1)),
    Degrees(4, tp=2),
    Degrees(4, tp=2, sp=True, ranks=(2, 1, 3, 0)),
    Degrees(4, cp=2, order="zigzag"),
    Degrees(4, ep=2, ranks=(3, 1, 2, 0)),
    Degrees(4, etp=2),
    Degrees(4, tp=2, ep=2, sp=True),
]


@pytest.mark.parametrize("world", on_demand([2, 4], [4]))
def test_every_layer_under_data_and_another_degree(world: int, ranks: Any) -> None:
    zeros: tuple[Zero, ...] = (1, 2, 3)
    cases = [
        Case(only(symbol), d, zeros[i % 3])
        for i, (symbol, d) in enumerate(
            (s, d) for s in "M*-E" for d in PAIRS if d.world == world and (s == "E" or d.ep == d.etp == 1)
        )
    ]
    results = ranks(world, run_cases, cases, timeout=240)
    for i, case in enumerate(cases):
        check(case, [r[i] for r in results])


WHOLE = [Degrees(2), Degrees(4, tp=2, ep=2, ranks=(3, 1, 2, 0)), Degrees(4, cp=2, ep=4)]


@pytest.mark.slow
@pytest.mark.parametrize("degrees", WHOLE, ids=str)
def test_every_way_of_holding_a_whole_model(degrees: Degrees, ranks: Any) -> None:
    cases = [Case(MODEL, degrees, zero) for zero in (1, 2, 3)]
    results = ranks(degrees.world, run_cases, cases, timeout=240)
    for i, case in enumerate(cases):
        found = [r[i] for r in results]
        check(case, found)
        for r in found:
            sizes = r["sizes"]
            assert sizes["end"] == sizes["start"]  # sharded between steps, whatever the way
            assert (sizes["forward"] == sizes["start"]) == (case.zero == 3)
            assert (sizes["gradients"] == 0) == (case.zero == 1)
