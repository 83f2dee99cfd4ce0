"""Floating point operations of a step, by module.

Attention and scan are counted. Recomputation is not, nor is the head of tokens without loss.
"""

from __future__ import annotations

from encoders.module import module_flops
from llm.flops import flops as llm_flops
from mm.plan.blueprint import SINK, Blueprint
from mm.plan.step_plan import Microbatch, StepPlan, supervised_tokens


def forward_flops(blueprint: Blueprint, mb: Microbatch) -> dict[str, float]:
    """Forward FLOPs of a micro-batch over all ranks, by module."""
    out = dict.fromkeys(blueprint.modules, 0.0)
    for module, edge in mb.edges.items():
        use = blueprint.inputs.encoders[module]
        hidden = blueprint.cfg.model[module].projector.hidden
        for item in edge.items:
            out[module] += module_flops(use.cls, use.cfg, item.part.meta, blueprint.llm.d_model, hidden)
    supervised = sum(supervised_tokens(s) for s in mb.samples)
    out[SINK] = llm_flops(blueprint.llm, mb.length, supervised)
    return out


def step_flops(blueprint: Blueprint, plan: StepPlan) -> dict[str, float]:
    """FLOPs of forward and backward over all ranks. Frozen modules have no backward."""
    work = [forward_flops(blueprint, mb) for mb in plan.microbatches]
    # Backward costs twice the forward: one product for the inputs, one for the weights.
    times = {m: 1.0 if m in blueprint.frozen else 3.0 for m in blueprint.modules}
    return {m: sum(w[m] for w in work) * times[m] for m in blueprint.modules}
