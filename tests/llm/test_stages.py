"""A model in stages is the model: losses, gradients and names, wherever stages end."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm.config import LLMConfig
from llm.counts import Counts
from llm.flops import head_flops, layer_costs
from llm.model import LLM, LLMBatch
from llm.stages import entering_levels, partition, shared_parameters
from parallel.sharding.param import declared, initialise
from parallel.topology.stage import Stage, stages_of
from tests.llm.harness import Text, far, make_batch, make_rows, tiny, weigh

FULL = tiny(pattern="ME*-EM", latent=6, mtp_layers=2, aux_weight=0.1, z_weight=0.05, level_layers=(0, 3))
TEXT = Text((11, 1, 18), 2, seed=1, rows_at=(0, 5, 6, 7, 29))


def stage_model(cfg: LLMConfig, stage: Stage) -> LLM:
    model = LLM(cfg, stage=stage, dtype=torch.float64)
    initialise(model, 3, "llm")
    for moe in model.moe_layers():
        moe.expert_bias.copy_(0.2 * torch.cos(torch.arange(cfg.n_experts)))
    return model


def chain(cfg: LLMConfig, stages: tuple[Stage, ...]) -> tuple[Tensor, dict[str, Tensor], Tensor, list[Any]]:
    """Loss per token, gradients by full name, the rows' gradients, and the loads of routed layers."""
    batch, _ = make_batch(TEXT, cfg.vocab_size)
    batch = replace(batch, counts=Counts(2, (3, 2)[: cfg.mtp_layers]))
    levels = 1 + len(cfg.level_layers)
    values = torch.stack([make_rows(replace(TEXT, seed=k), cfg.d_model) for k in range(levels)], 1)
    models = [stage_model(cfg, s) for s in stages]
    # Each stage is given the levels that enter there, as the boundary does.
    entering = entering_levels(cfg, stages, levels)
    rows = {s: values[:, list(k)].clone().requires_grad_() for s, k in entering.items()}
    entered: list[Tensor | None] = [None]
    left: list[Tensor] = []
    for s, model in enumerate(models):
        left.append(model(batch, {"vision": rows[s]} if s in rows else {}, entered[-1]))
        entered.append(left[-1].detach().requires_grad_())
    weigh(left[-1]).backward()
    for k in range(len(stages) - 2, -1, -1):
        after = entered[k + 1]
        assert after is not None and after.grad is not None
        left[k].backward(after.grad)
    grads: dict[str, Tensor] = {}
    for model in models:
        for name, p, _ in declared(model):
            assert p.grad is not None, name
            grads[name] = grads[name] + p.grad if name in grads else p.grad
    d_rows = torch.zeros_like(values)
    for s, k in entering.items():
        grad = rows[s].grad
        assert grad is not None
        d_rows[:, list(k)] = grad
    return left[-1].detach(), grads, d_rows, [m.load for model in models for m in model.moe_layers()]


WHOLE = {tied: chain(replace(FULL, tied=tied), (Stage(0, 6),)) for tied in (False, True)}


@settings(max_examples=12, deadline=None)
@given(st.sets(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_stages_chained_are_the_whole(edges: set[int], tied: bool) -> None:
    cfg = replace(FULL, tied=tied)
    stages = stages_of([0, *sorted(edges), 6])
    loss, grads, d_rows, loads = chain(cfg, stages)
    whole_loss, whole_grads, whole_rows, whole_loads = WHOLE[tied]
    torch.testing.assert_close(loss, whole_loss, rtol=1e-9, atol=1e-12)
    assert not far(grads, whole_grads)
    torch.testing.assert_close(d_rows, whole_rows, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(loads, whole_loads, strict=True))


def test_a_stage_holds_its_own_layers_only() -> None:
    stages = stages_of([0, 2, 5, 6])
    names = [{n for n, _, _ in declared(LLM(FULL, stage=s, device="meta"))} for s in stages]
    whole = {n for n, _, _ in declared(LLM(FULL, device="meta"))}
    assert set.union(*names) == whole
    twice = {n for i, a in enumerate(names) for b in names[i + 1 :] for n in a & b}
    assert twice == set(shared_parameters(FULL, stages)) == {"embed.weight"}
    assert {n.split(".")[1] for n in names[1]} == {"2", "3", "4"}
    untied = replace(FULL, mtp_layers=0)
    assert shared_parameters(untied, stages) == ()
    assert not any(n.startswith("embed") for n, _, _ in declared(LLM(untied, stage=stages[2], device="meta")))


def test_rows_are_read_where_levels_enter() -> None:
    three = stages_of([0, 2, 5, 6])
    assert entering_levels(FULL, three, 3) == {0: (0, 1), 1: (2,)}
    assert entering_levels(FULL, three, 2) == {0: (0, 1)} and entering_levels(FULL, three, 1) == {0: (0,)}
    assert entering_levels(replace(FULL, level_layers=(5, 0)), three, 3) == {0: (0, 2), 2: (1,)}
    assert entering_levels(replace(FULL, level_layers=()), stages_of([0, 3, 6]), 1) == {0: (0,)}


def test_patterns_may_mark_their_stages() -> None:
    cfg = replace(FULL, pattern="ME|*-E|M")
    assert partition(cfg, 3) == stages_of([0, 2, 5, 6])
    assert partition(cfg, 1) == (Stage(0, 6),)
    with pytest.raises(ValueError, match="has 3 stages, the layout 2"):
        partition(cfg, 2)
    with pytest.raises(ValueError, match="Nearest: 6"):
        partition(FULL, 7)
    batch, _ = make_batch(TEXT, cfg.vocab_size)
    empty = {"vision": torch.zeros(5, cfg.d_model, dtype=torch.float64)}
    a, b = (stage_model(c, Stage(0, 6))(batch, empty) for c in (cfg, FULL))
    assert torch.equal(a, b)


def test_costliest_stage_is_cheapest() -> None:
    cfg = tiny(pattern="M" * 7 + "*" * 5, vocab_size=2048)
    costs = layer_costs(cfg, [512])
    head = head_flops(cfg, [512])

    def worst(edges: list[int]) -> float:
        ends = [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]
        return max([*ends[:-1], ends[-1] + head])

    best = min(worst([0, a, b, 12]) for a in range(1, 11) for b in range(a + 1, 12))
    stages = partition(cfg, 3, [512])
    assert worst([0, *(s.stop for s in stages)]) == pytest.approx(best)


def test_a_level_is_added_after_its_layer() -> None:
    """By hand: the same model, whose layers are called one by one."""
    cfg = tiny(pattern="-M-", level_layers=(1,))
    batch, _ = make_batch(TEXT, cfg.vocab_size)
    model = stage_model(cfg, Stage(0, 3))
    rows = torch.stack([make_rows(TEXT, cfg.d_model), 2.0 * make_rows(TEXT, cfg.d_model)], 1)
    seen: list[Tensor] = []
    model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(batch, {"vision": rows})
    model(batch, {"vision": rows[:, 0]})  # one level only: nothing is added
    added = seen[0] - seen[1]
    expected = torch.zeros_like(added).index_copy(0, batch.row_positions["vision"], rows[:, 1])
    torch.testing.assert_close(added, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(AssertionError):
        model(LLMBatch(batch.ids, batch.labels, batch.packing, batch.n_real, {}), {}, seen[0])
