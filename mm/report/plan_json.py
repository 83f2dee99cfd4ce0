"""The plan of a job for tools: plan.json."""

from __future__ import annotations

import json
import math
from typing import Any

from mm.data.index import Index
from mm.data.order import sample_ids
from mm.plan.blueprint import SINK, Blueprint
from mm.plan.flops import step_flops
from mm.plan.step_plan import StepPlan, plan_step
from mm.report.header import weight_bytes
from parallel.boundary import edge_rows, on_stage
from parallel.schedule import SchedulePlan
from parallel.topology.layout import Layout


def first_step(blueprint: Blueprint, index: Index) -> StepPlan:
    """The plan of step 0."""
    cfg = blueprint.cfg
    ids = sample_ids(cfg.run.seed, 0, cfg.train.global_batch, len(index.samples), frozenset(index.skipped))
    return plan_step(0, [index.samples[i] for i in ids], blueprint.inputs)


def plan_data(blueprint: Blueprint, index: Index) -> dict[str, Any]:
    """Layouts, ranks, edges of the first step with their bytes, FLOPs, memory and schedule, as plain data."""
    plan = first_step(blueprint, index)
    frozen = blueprint.frozen
    return {
        "layouts": {m: _layout_data(layout) for m, layout in blueprint.layouts.items()},
        "edges": {m: _edge_data(blueprint, plan, m, m in frozen) for m in blueprint.inputs.encoders},
        "tokens": plan.tokens,
        "flops_by_module": step_flops(blueprint, plan),
        "weight_bytes_per_rank": weight_bytes(blueprint),
        "stages": {m: [[s.start, s.stop] for s in stages] for m, stages in blueprint.stages.items()},
        "schedule": _schedule_data(blueprint.schedule(plan.active)),
        "encoders": {m: use.cls.__name__ for m, use in blueprint.inputs.encoders.items()},
    }


def _schedule_data(schedule: SchedulePlan) -> dict[str, Any]:
    """The schedule's name, and the actions of each set of ranks that does the same."""
    programs = zip(schedule.ranks_of, schedule.programs, strict=True)
    lists = [{"ranks": list(ranks), "actions": [str(a) for a in actions]} for ranks, actions in programs]
    return {"kind": schedule.kind, "programs": lists}


def plan_json(blueprint: Blueprint, index: Index) -> str:
    """plan_data() as JSON text."""
    return json.dumps(plan_data(blueprint, index), indent=1)


def _layout_data(layout: Layout) -> dict[str, Any]:
    names = ("tp", "cp", "dp", "pp", "vpp", "ep", "edp", "etp", "sequence_parallel")
    return {"ranks": list(layout.ranks), **{n: getattr(layout, n) for n in names}}


def _edge_data(blueprint: Blueprint, plan: StepPlan, module: str, frozen: bool) -> dict[str, int]:
    """Rows of an edge in one step, and the payload that ranks receive for it in both directions."""
    llm = blueprint.layouts[SINK]
    rows = sum(mb.edges[module].rows for mb in plan.microbatches)
    forward = backward = 0
    for edge in blueprint.edges:
        if edge.source != module:
            continue
        row_bytes = math.prod(blueprint.entry_shape(edge)) * blueprint.dtype.itemsize
        for mb in plan.microbatches:
            sides = mb.edges[module]
            received = edge_rows(sides.source, on_stage(llm, sides.dest, edge.stage % llm.pp))
            forward += received.forward * row_bytes
            backward += 0 if frozen else received.backward * row_bytes
    return {"rows": rows, "forward_bytes": forward, "backward_bytes": backward}
