"""Objectives of the language model besides the next token: each is a mean of its own over the step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.config import LLMConfig
from llm.model import LLM, LLMBatch
from llm.mtp import IGNORE, ahead
from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.sample import Sample
from mm.data.tokenizer import Tokenizer
from mm.plan.blueprint import draw_up
from mm.plan.step_plan import plan_step
from mm.ranks.batch import Assembler
from parallel.boundary import PlanCache
from parallel.sharding.param import declared, initialise
from parallel.topology.axis import Axes
from tests.mm.harness import CONFIGS, small

SAMPLES = load_index(["data/digits-train-*.tar"], CONFIGS).samples[:6]
WEIGHTS = {"aux_weight": 0.7, "z_weight": 0.3, "mtp_weight": 0.9}


def few_supervised(sample: Sample) -> Sample:
    """The same tokens, of which the end marker alone has a loss."""
    return replace(sample, segments=tuple(replace(s, loss=False) for s in sample.segments))


def step(
    samples: tuple[Sample, ...], microbatches: int, **weights: float
) -> tuple[LLMConfig, list[LLMBatch]]:
    """The model's config, and the batches of a step on one rank as the job makes them."""
    model = {"llm": {**small()["model"]["llm"], "pattern": "EM-", "mtp_layers": 2, **weights}}
    raw = small(model=model, schedule={"microbatches": microbatches})
    blueprint = draw_up(from_mapping(raw, CONFIGS), 1)
    axes = dict.fromkeys(blueprint.modules, Axes())
    shapes = {edge: blueprint.entry_shape(edge) for edge in blueprint.edges}
    reader, cpu = ShardReader(), torch.device("cpu")
    assembler = Assembler(
        blueprint.inputs,
        reader,
        Tokenizer(),
        rank=0,
        dtype=torch.float64,
        device=cpu,
        axes=axes,
        sink="llm",
        row_shapes=shapes,
        plans=PlanCache(0),
    )
    plan = plan_step(0, samples, blueprint.inputs)
    batches = []
    for mb, own in zip(plan.microbatches, assembler.boundary(plan), strict=True):
        part = assembler.build(mb, plan.counts, [], own)
        assert part is not None and part.llm is not None
        batches.append(replace(part.llm, row_positions={}))  # placeholders stay what they are
    reader.close()
    return blueprint.llm, batches


def build(cfg: LLMConfig) -> LLM:
    model = LLM(cfg, dtype=torch.float64).train()
    initialise(model, 5, "llm")
    return model


def learned(
    samples: tuple[Sample, ...], microbatches: int = 2, **weights: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the objectives alone add to every gradient, and their reported values."""
    cfg, batches = step(samples, microbatches, **weights)
    model = build(cfg)
    for batch in batches:
        (0.0 * model(batch, {}).sum()).backward()
    values = {k: float(v) for k, v in model.take_objectives().items()}
    return {n: p.grad for n, p, _ in declared(model) if p.grad is not None and p.grad.any()}, values


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        assert (grad - theirs[name]).abs().max() <= 1e-10 * theirs[name].abs().max(), name


@pytest.mark.parametrize("objective", ["balance", "z"])
def test_a_weight_acts_the_same_whatever_share_is_supervised(objective: str) -> None:
    weights = {"aux_weight": 0.0, "z_weight": 0.0, "mtp_weight": 0.0}
    weights["aux_weight" if objective == "balance" else "z_weight"] = 0.5
    (grads, values), (fewer, same) = (
        learned(s, **weights) for s in (SAMPLES, tuple(map(few_supervised, SAMPLES)))
    )
    close(fewer, grads)
    assert same[objective] == pytest.approx(values[objective], rel=1e-9) and values[objective] > 0


def of_router(logits: Tensor, lengths: list[int], cfg: LLMConfig) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of one stream: of its documents' balance losses (DeepSeek-V3, arXiv 2412.19437,
    equations 17 to 20, each times its tokens) and of z-losses (ST-MoE, arXiv 2202.08906, equation 5)."""
    score = torch.sigmoid(logits)
    balance, at = score.new_zeros(()), 0
    for n in lengths:
        one = score[at : at + n]
        chosen = F.one_hot(one.topk(cfg.top_k).indices, cfg.n_experts).sum((0, 1))
        f = cfg.n_experts / (cfg.top_k * n) * chosen.double()
        p = (one / one.sum(1, keepdim=True)).mean(0)
        balance = balance + n * (f * p).sum()
        at += n
    return balance, logits.exp().sum(1).log().square().sum()


def by_hand(cfg: LLMConfig, batches: list[LLMBatch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same as learned(), from what routers and the block of multi-token prediction give."""
    model = build(replace(cfg, aux_weight=0.0, z_weight=0.0, mtp_weight=0.0))
    logits: list[Tensor] = []
    states: list[Tensor] = []
    for moe in model.moe_layers():
        moe.router.register_forward_hook(lambda _, args, out: logits.append(out))
    assert model.mtp is not None
    model.mtp.register_forward_hook(lambda _, args, out: states.append(out))
    balance = z = torch.zeros((), dtype=torch.float64)
    routed, sums, counts = 0, [balance] * cfg.mtp_layers, [0] * cfg.mtp_layers
    for batch in batches:
        logits.clear()
        states.clear()
        model(batch, {})
        lengths = [n for n in batch.packing.lengths if n]
        assert sum(lengths) == batch.n_real, "without padding, for the hand's sake"
        for one in logits:  # of each layer, and of the block each time it is applied
            of_balance, of_z = of_router(one, lengths, cfg)
            balance, z = balance + of_balance, z + of_z
        routed += batch.n_real
        _, mtp_labels = ahead(batch.ids, batch.labels, batch.packing, cfg.mtp_layers)
        for k, (h, labels) in enumerate(zip(states, mtp_labels, strict=True)):
            own = F.cross_entropy(h @ model.head_weight().T, labels, reduction="sum", ignore_index=IGNORE)
            sums[k], counts[k] = sums[k] + own, counts[k] + int((labels != IGNORE).sum())
    means = torch.stack([s / n for s, n in zip(sums, counts, strict=True)])
    values = {"balance": balance / routed, "z": z / routed, "mtp": means.mean()}
    (
        cfg.aux_weight * values["balance"] + cfg.z_weight * values["z"] + cfg.mtp_weight * values["mtp"]
    ).backward()
    grads = {n: p.grad for n, p, _ in declared(model) if p.grad is not None and p.grad.any()}
    return grads, {k: float(v.detach()) for k, v in values.items()}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_objectives_are_the_published_means_over_the_step(sparse: bool, microbatches: int) -> None:
    samples = tuple(few_supervised(s) if i % 2 else s for i, s in enumerate(SAMPLES)) if sparse else SAMPLES
    cfg, batches = step(samples, microbatches, **WEIGHTS)
    grads, values = learned(samples, microbatches, **WEIGHTS)
    expected, means = by_hand(cfg, batches)
    close(grads, expected)
    assert values == pytest.approx(means, rel=1e-9)
