"""The plan of a job, for people (`--dry-run`) and for tools (plan.json). Starts nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.commands.preflight import check_fits
from mm.data.index import Index
from mm.data.order import sample_ids
from mm.errors import Refused
from mm.plan.blueprint import SINK, Blueprint
from mm.plan.flops import step_flops
from mm.plan.step_plan import StepPlan, plan_step
from mm.ranks.job import open_indexes
from mm.ranks.launch import choose_device
from mm.report.header import gib, header, memory_warning, weight_bytes
from mm.report.timeline import RATE, draw_simulated
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
            there, back = edge_rows(sides.source, on_stage(llm, sides.dest, edge.stage % llm.pp))
            forward += there * row_bytes
            backward += 0 if frozen else back * row_bytes
    return {"rows": rows, "forward_bytes": forward, "backward_bytes": backward}


def dry_run(blueprint: Blueprint, draw: Path | None = None) -> str:
    """Rank table, edges, bytes, FLOPs, memory and schedule of the first step; writes nothing.

    draw: a folder to draw the step in, which is then written.
    """
    indexes = open_indexes(blueprint, write=False)
    index = indexes["training"]
    check_fits(blueprint, index)
    data = plan_data(blueprint, index)
    lines = [f"{blueprint.world} ranks", *_header(blueprint, indexes), ""]
    modules = blueprint.modules
    lines.append("rank  " + "  ".join(f"{m:<24}" for m in modules))
    for rank in range(blueprint.world):
        cells = [_place(blueprint.layouts[m], rank) for m in modules]
        lines.append(f"{rank:>4}  " + "  ".join(f"{c:<24}" for c in cells))
    lines += ["", f"first step: {data['tokens']} tokens, {blueprint.cfg.train.global_batch} samples"]
    for m, edge in data["edges"].items():
        total = edge["forward_bytes"] + edge["backward_bytes"]
        lines.append(
            f"edge {m} -> {SINK}: {edge['rows']} rows, {total / 2**10:.1f} KiB received by all ranks"
        )
    for m in modules:
        lines.append(
            f"{m}: {blueprint.layouts[m].describe()}, {data['flops_by_module'][m] / 1e9:.2f} GFLOP a step, "
            f"{gib(data['weight_bytes_per_rank'][m])} weights and optimizer a rank"
        )
    schedule = data["schedule"]
    for program in schedule["programs"]:
        lines += ["", f"schedule {schedule['kind']} of ranks {', '.join(map(str, program['ranks']))}:"]
        lines += [f"  {a}" for a in program["actions"]]
    if draw is not None:
        drawn = draw_simulated(blueprint, first_step(blueprint, index), draw)
        lines += ["", f"drawn, at {RATE / 1e9:g} GFLOP/s a rank: {', '.join(map(str, drawn))}"]
    return "\n".join(lines)


def _header(blueprint: Blueprint, indexes: Mapping[str, Index]) -> list[str]:
    """The header of the run and what speaks against it, were it started on this machine."""
    cfg = blueprint.cfg
    try:
        found = choose_device(cfg.run.device, 0, blueprint.world, torch.cuda.device_count())
    except Refused:  # planned here for another machine
        found = "cuda"
    device = torch.device(found).type
    text = header(blueprint, indexes, device, dist.get_default_backend_for_device(device))
    warning = memory_warning(blueprint, device, blueprint.world)
    return [text, *([f"warning: {warning}"] if warning else [])]


def _place(layout: Layout, rank: int) -> str:
    if rank not in layout.ranks:
        return "-"
    dense, expert = layout.coord(rank), layout.expert_coord(rank)
    further = [f"{a}{getattr(dense, a)}" for a in ("cp", "pp") if getattr(layout, a) > 1]
    further += [f"ep{expert.ep}"] if layout.ep > 1 else []
    return " ".join([f"dp{dense.dp} tp{dense.tp}", *further])
