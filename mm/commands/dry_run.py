"""`train --dry-run`: the plan of a job for people. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mm.commands.preflight import check_fits
from mm.config.outline import SINK
from mm.data.sample import Index
from mm.errors import Refused
from mm.plan.blueprint import Blueprint
from mm.plan.made_up import made_up_index
from mm.ranks.job import open_indexes
from mm.ranks.launch import choose_device
from mm.report.groups import communicator_lines
from mm.report.header import header, memory_warning, ranks_text
from mm.report.plan_json import PlanData, first_step, plan_data
from mm.report.timeline import RATE, draw_simulated
from mm.report.units import bytes_text, flops_text
from parallel.topology.layout import AXES, Layout, View

ROWS = 16  # of the rank table with a row for each rank


def dry_run(blueprint: Blueprint, draw: Path | None = None, *, data: bool = True) -> str:
    """Rank table, edges, bytes, FLOPs, memory and schedule of the first step; writes nothing.

    draw: a folder to draw the step in, the only thing that is then written. data: whether the samples are
    there; made-up ones take their place otherwise.
    """
    indexes = open_indexes(blueprint, write=False) if data else {"training": made_up_index(blueprint)}
    index = indexes["training"]
    check_fits(blueprint, index)
    plan = plan_data(blueprint, index)
    lines = [f"{blueprint.world} ranks", *_header(blueprint, indexes), ""]
    lines += [] if data else ["made-up samples of ragged lengths (--no-data)", ""]
    modules = blueprint.modules
    lines += rank_table(blueprint)
    lines += ["", f"first step: {plan.tokens:,} tokens, {blueprint.cfg.train.global_batch:,} samples"]
    for m, edge in plan.edges.items():
        total = edge.forward_bytes + edge.backward_bytes
        lines.append(f"edge {m} -> {SINK}: {edge.rows:,} rows, {bytes_text(total)} received by all ranks")
    for m in modules:
        lines.append(
            f"{m}: {blueprint.layouts[m].describe()}, {flops_text(plan.flops_by_module[m])} a step, "
            f"{bytes_text(plan.weight_bytes_per_rank[m])} weights and optimizer a rank"
        )
    lines += communicator_lines(plan.communicators)
    lines += ["", *_policies(plan)]
    for program in plan.schedule.programs:
        lines += ["", f"schedule {plan.schedule.kind} of ranks {ranks_text(program.ranks)}:"]
        lines += [f"  {a}" for a in program.actions]
    if draw is not None:
        drawn = draw_simulated(blueprint, first_step(blueprint, index), draw)
        lines += ["", f"drawn, at {RATE / 1e9:g} GFLOP/s a rank: {', '.join(map(str, drawn))}"]
    return "\n".join(lines)


def _header(blueprint: Blueprint, indexes: Mapping[str, Index]) -> list[str]:
    """The header of the run, and a warning where this machine has too little memory for it."""
    cfg = blueprint.cfg
    try:
        found = choose_device(cfg.run.device, 0, blueprint.world, torch.cuda.device_count())
    except Refused:  # this machine has no such device: the plan is for another one
        found = "cuda"
    device = torch.device(found).type
    text = header(blueprint, indexes, device, dist.get_default_backend_for_device(device))
    warning = memory_warning(blueprint, device, blueprint.world)
    return [text, *([f"warning: {warning}"] if warning else [])]


def _policies(data: PlanData) -> list[str]:
    """What each data-parallel policy costs a rank of each module; "*" marks the module's own."""
    head = ("data parallel", "at rest", "in a step", "peak", "gathers", "reduce-scatters", "all-reduces")
    rows: list[tuple[str, ...]] = [head]
    for m, found in data.data_parallel.items():
        for policy, cost in found.costs.items():
            moved, mark = cost.moved, " *" if policy == found.policy else ""
            held = tuple(bytes_text(n) for n in (cost.rest, cost.step, cost.peak))
            pairs = (
                (moved.gathers, moved.gather_bytes),
                (moved.scatters, moved.scatter_bytes),
                (moved.sums, moved.sum_bytes),
            )
            rows.append(
                (f"{m} {policy}{mark}", *held, *(f"{n} of {bytes_text(b)}" if n else "-" for n, b in pairs))
            )
    return _columns(rows)


def rank_table(blueprint: Blueprint) -> list[str]:
    """Where ranks stand on the axes of each module: a row a rank where they are few, else a row for all that
    are on the same pipeline ranks of the same modules."""
    modules, rows = blueprint.modules, dict[object, list[int]]()
    found = {m: _coordinates(blueprint.layouts[m]) for m in modules}
    for rank in range(blueprint.world):
        places = tuple(found[m][rank]["pp"] if rank in found[m] else None for m in modules)
        rows.setdefault(rank if blueprint.world <= ROWS else places, []).append(rank)
    cells = [("ranks", *modules)]
    for ranks in rows.values():
        cells.append((ranks_text(ranks), *(_span(blueprint.layouts[m], found[m], ranks) for m in modules)))
    return _columns(cells)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _coordinates(layout: Layout) -> dict[int, dict[str, int]]:
    """By rank of a module, where it stands on each axis."""
    out: dict[int, dict[str, int]] = {rank: {} for rank in layout.ranks}
    views: tuple[View, ...] = ("dense", "expert")
    for view in views:
        before = 1
        for axis, n in zip(AXES[view], layout.shape(view), strict=True):
            for k, rank in enumerate(layout.ranks):
                out[rank][axis] = k // before % n
            before *= n
    return out


def _span(layout: Layout, found: Mapping[int, Mapping[str, int]], ranks: Sequence[int]) -> str:
    """Where ranks stand on a module's axes, the fastest first; "-" where they do not host the module."""
    if ranks[0] not in found:
        return "-"
    axes = [a for a in ("tp", "cp", "dp", "pp", "etp", "ep") if getattr(layout, a) > 1]
    return " ".join(f"{a}{ranks_text(sorted({found[r][a] for r in ranks}))}" for a in axes) or "whole"
