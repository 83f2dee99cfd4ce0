"""`train --dry-run`: the plan of a job for people. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
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
from mm.report.header import gib, header, memory_warning
from mm.report.plan_json import PlanData, first_step, plan_data
from mm.report.timeline import RATE, draw_simulated
from parallel.topology.layout import Layout


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
    lines.append("rank  " + "  ".join(f"{m:<24}" for m in modules))
    for rank in range(blueprint.world):
        cells = [_coordinates(blueprint.layouts[m], rank) for m in modules]
        lines.append(f"{rank:>4}  " + "  ".join(f"{c:<24}" for c in cells))
    lines += ["", f"first step: {plan.tokens} tokens, {blueprint.cfg.train.global_batch} samples"]
    for m, edge in plan.edges.items():
        total = edge.forward_bytes + edge.backward_bytes
        lines.append(f"edge {m} -> {SINK}: {edge.rows} rows, {total / 2**10:.1f} KiB received by all ranks")
    for m in modules:
        lines.append(
            f"{m}: {blueprint.layouts[m].describe()}, {plan.flops_by_module[m] / 1e9:.2f} GFLOP a step, "
            f"{gib(plan.weight_bytes_per_rank[m])} weights and optimizer a rank"
        )
    lines += communicator_lines(plan.communicators)
    lines += ["", *_policies(plan)]
    for program in plan.schedule.programs:
        lines += ["", f"schedule {plan.schedule.kind} of ranks {', '.join(map(str, program.ranks))}:"]
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
            held = tuple(gib(n) for n in (cost.rest, cost.step, cost.peak))
            pairs = (
                (moved.gathers, moved.gather_bytes),
                (moved.scatters, moved.scatter_bytes),
                (moved.sums, moved.sum_bytes),
            )
            rows.append((f"{m} {policy}{mark}", *held, *(f"{n} of {gib(b)}" if n else "-" for n, b in pairs)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _coordinates(layout: Layout, rank: int) -> str:
    """Where a rank stands on a module's axes; "-" where it does not host the module."""
    if rank not in layout.ranks:
        return "-"
    dense, expert = layout.coord(rank), layout.expert_coord(rank)
    parts = [f"dp{dense.dp} tp{dense.tp}"]
    parts += [f"cp{dense.cp}"] if layout.cp > 1 else []
    parts += [f"pp{dense.pp}"] if layout.pp > 1 else []
    parts += [f"ep{expert.ep}"] if layout.ep > 1 else []
    return " ".join(parts)
