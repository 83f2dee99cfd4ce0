"""The whole model, every objective included, under random degrees, stages and ways of saving memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm.config import LLMConfig
from llm.counts import Counts
from llm.model import LLM, LLMBatch
from llm.mtp import ahead
from llm.rotary import RopeAxes, RopeScaling
from parallel.context_parallel import ContextPacking, pack
from parallel.sequence.grid import RowGrid, grid_positions
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes
from parallel.topology.stage import Stage, stages_of
from tests.llm.degrees import Degrees, check_gradients, close, make_axes, shape_axes, shard_ranks
from tests.llm.harness import EVERYTHING, shard_by_hand
from tests.slow import on_demand

MODEL = replace(EVERYTHING, vocab_size=32)
# Switches of other families, all at once; the block of multi-token prediction has no window here.
SWITCHED = replace(
    MODEL,
    attention_bias=False,
    qkv_bias=True,
    qk_norm="full",
    rope_scaling=RopeScaling("yarn", 4.0, 30),
    rope_axes=RopeAxes((0, 1, 1)),
    window=5,
    window_layers=(3,),
    window_rope_theta=30.0,
    norms="both",
    norm_shift=True,
    embed_scale=2.0,
    branch_scale=0.5,
    logit_scale=0.7,
    logit_cap=2.0,
    attention_scale=0.3,
    attention_cap=0.8,
    attention_sinks=True,
    activation="gelu_tanh",
)
LENGTHS = ((11, 1, 25), (), (20,), (3, 0, 2))
COUNTS = Counts(10, (7, 4))
SALT = 134  # of the random cases: chosen so that few of them have every degree, in pairs too


@dataclass(frozen=True)
class Case:
    """One way to run the model; edges: layers at which stages after the first begin."""

    cfg: LLMConfig
    degrees: Degrees
    edges: tuple[int, ...] = ()
    recompute: str = "none"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return stages_of([0, *self.edges, len(self.cfg.symbols)])


def build(cfg: LLMConfig, axes: Axes, stages: tuple[Stage, ...], device: str | None = None) -> list[LLM]:
    models = [LLM(cfg, axes, stage=s, device=device, dtype=torch.float64) for s in stages]
    for model in models if device is None else []:
        initialise(model, 3, "llm")
        shard_by_hand(model, axes)
        for moe in model.moe_layers():
            moe.expert_bias.copy_(0.2 * torch.cos(torch.arange(cfg.n_experts)))
    return models


def stream(index: int, step: int, cfg: LLMConfig) -> tuple[LLMBatch, Tensor]:
    """A whole stream of documents, and the weight of each token's loss."""
    lengths = LENGTHS[index % len(LENGTHS)] or (0,)
    real = sum(lengths)
    padding = max(step, -(-real // step) * step) - real
    gen = torch.Generator().manual_seed(index)
    ids, labels = torch.randint(0, cfg.vocab_size, (2, real + padding), generator=gen)
    labels[torch.rand(len(labels), generator=gen) < 0.3] = -100
    labels[real:] = -100
    weight = torch.cos(torch.arange(len(ids), dtype=torch.float64))
    packing = Packing.of([*lengths, padding])
    if cfg.rope_axes is not None:
        # The second half of each document is a picture.
        runs = [[n - 2 * (n // 4), RowGrid(1, 2, n // 4)] for n in packing.lengths]
        packing = replace(packing, places=torch.from_numpy(np.hstack([grid_positions(r) for r in runs])))
    return LLMBatch(ids, labels, packing, real, {}, COUNTS), weight


def own_share(batch: LLMBatch, axes: Axes, degrees: Degrees, cfg: LLMConfig) -> tuple[LLMBatch, Tensor]:
    """This cp rank's part of a stream's batch, and its rows."""
    packing = pack(batch.packing.lengths, "cpu", axes.cp, degrees.order)
    if not isinstance(packing, ContextPacking):
        return batch, torch.arange(len(batch.ids))
    rows = torch.from_numpy(packing.rows)
    if batch.packing.places is not None:
        packing = replace(packing, places=batch.packing.places[:, rows])
    mtp = ahead(batch.ids, batch.labels, batch.packing, cfg.mtp_layers)
    share = replace(
        batch,
        ids=batch.ids[rows],
        labels=batch.labels[rows],
        packing=packing,
        n_real=packing.rows_before(batch.n_real),
        ahead=(mtp[0][:, rows], mtp[1][:, rows]),
    )
    return share, rows


def chain(models: list[LLM], batch: LLMBatch, weight: Tensor) -> Tensor:
    """Forward and backward through stages, one after another."""
    entered: list[Tensor | None] = [None]
    left: list[Tensor] = []
    for model in models:
        left.append(model(batch, {}, entered[-1]))
        entered.append(left[-1].detach().requires_grad_())
    (left[-1] * weight).sum().backward()
    for k in range(len(models) - 2, -1, -1):
        after = entered[k + 1]
        assert after is not None
        left[k].backward(after.grad)
    return left[-1].detach()


def collect(models: list[LLM]) -> dict[str, Any]:
    grads: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for model in models:
        for name, p, _ in declared(model):
            assert p.grad is not None, name
            grads[name] = grads[name] + p.grad if name in grads else p.grad
        for name, value in model.take_objectives().items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
    return {"grads": grads, "sums": sums, "load": [m.load for model in models for m in model.moe_layers()]}


def run_rank(cases: list[Case]) -> list[dict[str, Any]]:
    out = []
    for case in cases:
        axes = make_axes(case.degrees)
        models = build(case.cfg, axes, case.stages)
        for model in models:
            model.recompute = case.recompute
        coord = case.degrees.layout.coord(dist.get_rank())
        batch, weight = stream(coord.dp, case.degrees.step, case.cfg)
        share, rows = own_share(batch, axes, case.degrees, case.cfg)
        loss = chain(models, share, weight[rows])
        specs = {name: spec for model in models for name, _, spec in declared(model)}
        out.append(
            collect(models)
            | {"loss": loss, "rows": rows, "dp": coord.dp, "at": shard_ranks(specs, axes), "tp": axes.tp.rank}
        )
    return out


def run_whole(case: Case) -> dict[str, Any]:
    models = build(case.cfg, Axes(), (Stage(0, len(case.cfg.symbols)),))
    losses = []
    for dp in range(case.degrees.layout.dp):
        batch, weight = stream(dp, case.degrees.step, case.cfg)
        losses.append(chain(models, batch, weight))
    return collect(models) | {"losses": losses}


def compare(case: Case, results: list[dict[str, Any]]) -> None:
    ref = run_whole(case)
    for result in results:
        close(result["loss"], ref["losses"][result["dp"]][result["rows"]], f"loss of {case}")
    for name, value in ref["sums"].items():
        total = sum(r["sums"][name] for r in results if name != "mtp" or r["tp"] == 0)
        assert isinstance(total, Tensor)
        close(total, value, f"{name} of {case}")
    for layer, load in enumerate(ref["load"]):
        assert torch.equal(sum(r["load"][layer] for r in results), load), case
    axes = shape_axes(case.degrees)
    (whole,) = build(case.cfg, axes, (Stage(0, len(case.cfg.symbols)),), "meta")
    check_gradients(whole, axes, results, ref["grads"], str(case))


def draw(seed: int, world: int) -> Case:
    r = random.Random(SALT * world + seed)
    dense = [(tp, cp) for tp in (1, 2, 4) for cp in (1, 2, 4) if world % (tp * cp) == 0]
    tp, cp = r.choice(dense)
    ep, etp = r.choice([(n, m) for n in (1, 2, 4) for m in (1, 2, 4) if world % (n * m) == 0])
    order = r.choice(("contiguous", "zigzag"))
    degrees = Degrees(world, tp, cp, ep, etp, sp=r.random() < 0.5, order=order)
    model = SWITCHED if seed % 2 else MODEL
    cfg = replace(model, tied=r.random() < 0.5, dispatcher=r.choice(("all_to_all", "all_gather")))
    edges = tuple(sorted(r.sample(range(1, 5), r.randrange(3))))
    recompute = r.choice(("none", "full", "mlp", "moe_act", "norm", "scan"))
    ranks = tuple(r.sample(range(world), world))
    return Case(cfg, replace(degrees, ranks=ranks), edges, recompute)


@pytest.mark.parametrize("world", on_demand([2, 4], [2]))
def test_any_degrees_at_once(world: int, ranks: Any) -> None:
    cases = [draw(seed, world) for seed in range(6)]
    results = ranks(world, run_rank, cases, timeout=120)
    for i, case in enumerate(cases):
        compare(case, [r[i] for r in results])
