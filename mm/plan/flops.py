"""Floating point operations of a step, by module.

Attention and scan are counted. Recomputation is not, nor is the head of tokens without loss.
"""

from __future__ import annotations

from encoders.module import row_flops
from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint, projector_kind
from mm.plan.step_plan import StepPlan
from mm.plan.table import Costs
from parallel.sequence.dealing import loads


def forward_flops(blueprint: Blueprint, plan: StepPlan) -> dict[str, Costs]:
    """Forward FLOPs over all ranks, by module, of each micro-batch."""
    n, out = len(plan.microbatches), {}
    for module, items in plan.items.items():
        use, projector = blueprint.inputs.encoders[module], blueprint.cfg.model[module].projector
        kind = projector_kind(projector)
        row = row_flops(use.cls, use.cfg, blueprint.llm.d_model, projector.hidden, kind)
        cost = items.cost + row * items.columns.own_rows
        out[module] = loads(cost, items.columns.batch, n)
    out[SINK] = loads(plan.llm_cost, plan.seats.microbatch, n)
    return out


def step_flops(blueprint: Blueprint, plan: StepPlan) -> dict[str, float]:
    """FLOPs of forward and backward over all ranks. Frozen modules have no backward."""
    work = forward_flops(blueprint, plan)
    # Backward costs twice the forward: one product for the inputs, one for the weights.
    times = {m: 1.0 if m in blueprint.frozen else 3.0 for m in blueprint.modules}
    return {m: float(work[m].sum()) * times[m] for m in blueprint.modules}
