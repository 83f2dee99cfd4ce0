"""Floating point operations of a step, by module.

Attention and scan are counted. Recomputation is not, nor is the head of tokens without loss.
"""

from __future__ import annotations

import numpy as np

from encoders.module import row_flops
from llm.flops import weightless_cost
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.projectors import projector_kind
from mm.plan.step_plan import StepPlan
from mm.plan.table import Costs
from mm.plan.trained import step_factors
from parallel.sequence.dealing import loads


def forward_flops(blueprint: Blueprint, plan: StepPlan) -> dict[str, Costs]:
    """Forward FLOPs over all ranks, by module, of each micro-batch."""
    n, out = len(plan.microbatches), {}
    for module, items in plan.items.items():
        cost = items.cost + _projector_flops(blueprint, plan, module)
        out[module] = loads(cost, items.columns.batch, n)
    out[SINK] = loads(plan.llm_cost, plan.seats.microbatch, n)
    return out


def _projector_flops(blueprint: Blueprint, plan: StepPlan, module: str) -> Costs:
    """Forward FLOPs of the projectors, by item."""
    use, projector = blueprint.inputs.encoders[module], blueprint.cfg.model[module].projector
    row = row_flops(use.cls, use.cfg, blueprint.llm.d_model, projector.hidden, projector_kind(projector))
    return np.asarray(row * plan.items[module].columns.own_rows, dtype=np.float64)


def step_flops(blueprint: Blueprint, plan: StepPlan) -> dict[str, float]:
    """FLOPs of forward and backward over all ranks."""
    out = {}
    for module, items in plan.items.items():
        encoder, projector = step_factors(blueprint, module)
        flops = _projector_flops(blueprint, plan, module)
        out[module] = float(encoder * items.cost.sum() + projector * flops.sum())
    out[SINK] = _llm_flops(blueprint, plan)
    return {m: out[m] for m in blueprint.modules}


def _llm_flops(blueprint: Blueprint, plan: StepPlan) -> float:
    """FLOPs of the language model. Where it is frozen, gradients pass through it to what is trained below."""
    forward, passes = float(plan.llm_cost.sum()), plan.inputs.passes_of(SINK)
    if SINK not in blueprint.frozen or passes == 1.0:
        return passes * forward
    # A frozen weight has no product for itself in the backward. What has no weight has its backward whole.
    weightless = weightless_cost(blueprint.llm).of(plan.table.length, plan.table.supervised)
    return passes * forward + float(weightless.sum())
