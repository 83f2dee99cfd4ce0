"""The same model, data, seed and batches under several layouts, in one job."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console as RichConsole
from rich.table import Table

from mm.blueprint import Blueprint, draw_up
from mm.config import Config
from mm.errors import Refused
from mm.feed import Feed
from mm.job import Job, build_job, open_data, open_index
from mm.launch import RankInfo, init_distributed
from mm.trainer import open_feed, train_step
from mm.variants import Variant


@dataclass
class Run:
    """One layout of a comparison. step_s holds the timed steps of every round, warm-up left out."""

    name: str
    blueprint: Blueprint
    layout: dict[str, Any]
    step_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[dict[str, float]] = field(default_factory=list)
    boundary_bytes: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0


def make_runs(variants: Sequence[Variant], world: int) -> list[Run]:
    """A run for each layout; raises Refused, naming its file, for any that does not work."""
    runs = []
    for variant in variants:
        try:
            blueprint = draw_up(variant.cfg, world)
        except Refused as error:
            raise Refused(f"{variant.path}: {error}") from error
        runs.append(Run(variant.name, blueprint, variant.layout))
    return runs


def compare(cfg: Config, runs: Sequence[Run], *, steps: int, rounds: int, json_out: Path | None) -> None:
    """Run `steps` steps under each layout in turn, the rounds interleaved (A B A B ..); print a table.

    Every round starts from the same weights, so its losses are those of the layout's first steps. The first
    layout is the baseline of the relative differences and of the speed-up.
    """
    rank = init_distributed(cfg)
    try:
        for number in range(rounds):
            for run in runs:
                _round(run, rank, steps, first=number == 0)
    finally:
        dist.destroy_process_group()
    if rank.rank == 0:
        report = {"runs": [summary(run, runs[0]) for run in runs]}
        if json_out is not None:
            json_out.write_text(json.dumps(report, indent=1))
        console = RichConsole()
        console.width = max(console.width, 120)  # a row a layout, also where nobody looks at a terminal
        console.print(table(report))


def _round(run: Run, rank: RankInfo, steps: int, *, first: bool) -> None:
    cfg = run.blueprint.cfg
    index = open_index(run.blueprint, cfg.data.train, cfg.base)
    job = build_job(run.blueprint, rank)
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        for step in range(steps):
            _timed_step(run, job, feed, step, first)
    finally:
        feed.close()
        data.assembler.reader.close()
    job.close()
    gc.collect()


def _timed_step(run: Run, job: Job, feed: Feed, step: int, first: bool) -> None:
    dist.barrier()
    start = time.perf_counter()
    record = train_step(job, feed, step)
    dist.barrier()
    seconds = time.perf_counter() - start
    if step > 0:  # the first step of a round pays for caches and lazy set-up
        run.step_s.append(seconds)
        run.tokens.append(record["tokens"])
        run.boundary_bytes.append(sum(v["bytes"] for v in record["boundary"].values()))
    if first:
        run.losses.append(record["loss"])
        run.grad_norms.append(record["grad_norm_by_module"])
        run.peak_memory_bytes = record["peak_memory_bytes"]


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |a - b| / |b| over pairs; 0 where both are 0."""
    return max((abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def summary(run: Run, base: Run) -> dict[str, Any]:
    """One entry of the comparison's JSON (docs: compare)."""
    times = run.step_s or [float("nan")]
    median = statistics.median(times)
    norms = [
        relative_difference(list(a.values()), list(b.values()))
        for a, b in zip(run.grad_norms, base.grad_norms, strict=True)
    ]
    return {
        "name": run.name,
        "layout": run.layout,
        "step_s": {"median": median, "min": min(times), "max": max(times)},
        "tokens_per_s": sum(run.tokens) / sum(run.step_s) if run.step_s else float("nan"),
        "peak_memory_bytes": run.peak_memory_bytes,
        "boundary_bytes_per_step": statistics.mean(run.boundary_bytes) if run.boundary_bytes else 0,
        "losses": run.losses,
        "grad_norms_by_module": run.grad_norms,
        "max_rel_loss_diff": relative_difference(run.losses, base.losses),
        "max_rel_grad_norm_diff": max(norms, default=0.0),
        "speedup": statistics.median(base.step_s) / median if run.step_s else 1.0,
    }


def table(report: dict[str, Any]) -> Table:
    """The comparison for people."""
    out = Table(title="same model, data, seed and batches; first row is the baseline")
    for heading in (
        "layout",
        "step ms (min)",
        "tokens/s",
        "memory MiB",
        "boundary KiB/step",
        "loss diff",
        "grad norm diff",
        "speed-up",
    ):
        out.add_column(heading, justify="left" if heading == "layout" else "right")
    for run in report["runs"]:
        out.add_row(
            run["name"],
            f"{run['step_s']['median'] * 1e3:.1f} ({run['step_s']['min'] * 1e3:.1f})",
            f"{run['tokens_per_s']:.0f}",
            f"{run['peak_memory_bytes'] / 2**20:.0f}",
            f"{run['boundary_bytes_per_step'] / 2**10:.1f}",
            f"{run['max_rel_loss_diff']:.1e}",
            f"{run['max_rel_grad_norm_diff']:.1e}",
            f"{run['speedup']:.2f}x",
        )
    return out
