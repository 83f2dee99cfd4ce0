"""The plan of a job, for people (`--dry-run`) and for tools (plan.json). Starts nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mm.blueprint import SINK, Blueprint, elements_per_rank
from mm.data.index import Index
from mm.data.inspect import count_lines
from mm.data.order import sample_ids
from mm.flops import step_flops
from mm.job import open_index
from mm.plan import StepPlan, plan_step
from mm.timeline import RATE, draw_simulated
from parallel.boundary import plan_edge
from parallel.layout import Layout
from parallel.schedule import SchedulePlan


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
        "weight_bytes_per_rank": _weight_bytes(blueprint),
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
    row_bytes = math.prod(blueprint.row_shape(module)) * blueprint.dtype.itemsize
    rows = forward = backward = 0
    for mb in plan.microbatches:
        edge = mb.edges[module]
        rows += edge.rows
        for rank in range(blueprint.world):
            part = plan_edge(module, edge.source, edge.dest, rank)
            forward += part.forward.received_rows
            backward += 0 if frozen else sum(t.received_rows for t in part.backward)
    return {"rows": rows, "forward_bytes": forward * row_bytes, "backward_bytes": backward * row_bytes}


def _weight_bytes(blueprint: Blueprint) -> dict[str, int]:
    """Weights, gradients and AdamW moments that a rank keeps of each module, by even shares."""
    item = 8 if blueprint.cfg.train.dtype == "float64" else 4
    copies = {m: 1 if m in blueprint.frozen else 4 for m in blueprint.modules}
    return {m: elements_per_rank(blueprint, m) * item * copies[m] for m in blueprint.modules}


def dry_run(blueprint: Blueprint, folder: Path) -> str:
    """Rank table, edges, bytes, FLOPs, memory and schedule of the first step, which is drawn in `folder`."""
    cfg = blueprint.cfg
    index = open_index(blueprint, cfg.data.train, cfg.base)
    data = plan_data(blueprint, index)
    lines = [f"{blueprint.world} ranks", ""]
    modules = blueprint.modules
    lines.append("rank  " + "  ".join(f"{m:<24}" for m in modules))
    for rank in range(blueprint.world):
        cells = [_place(blueprint.layouts[m], rank) for m in modules]
        lines.append(f"{rank:>4}  " + "  ".join(f"{c:<24}" for c in cells))
    lines += ["", *count_lines("training", index, list(blueprint.inputs.encoders))]
    lines += ["", f"first step: {data['tokens']} tokens, {blueprint.cfg.train.global_batch} samples"]
    for m, edge in data["edges"].items():
        total = edge["forward_bytes"] + edge["backward_bytes"]
        lines.append(
            f"edge {m} -> {SINK}: {edge['rows']} rows, {total / 2**10:.1f} KiB received by all ranks"
        )
    for m in modules:
        lines.append(
            f"{m}: {blueprint.layouts[m].describe()}, {data['flops_by_module'][m] / 1e9:.2f} GFLOP a step, "
            f"{data['weight_bytes_per_rank'][m] / 2**20:.2f} MiB weights and optimizer a rank"
        )
    schedule = data["schedule"]
    for program in schedule["programs"]:
        lines += ["", f"schedule {schedule['kind']} of ranks {', '.join(map(str, program['ranks']))}:"]
        lines += [f"  {a}" for a in program["actions"]]
    drawn = draw_simulated(blueprint, first_step(blueprint, index), folder)
    lines += ["", f"drawn, at {RATE / 1e9:g} GFLOP/s a rank: {', '.join(map(str, drawn))}"]
    return "\n".join(lines)


def _place(layout: Layout, rank: int) -> str:
    if rank not in layout.ranks:
        return "-"
    dense, expert = layout.coord(rank), layout.expert_coord(rank)
    further = [f"{a}{getattr(dense, a)}" for a in ("cp", "pp") if getattr(layout, a) > 1]
    further += [f"ep{expert.ep}"] if layout.ep > 1 else []
    return " ".join([f"dp{dense.dp} tp{dense.tp}", *further])
