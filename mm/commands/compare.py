"""The same model, data, seed and batches under several layouts, in one job."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.table import Table

from mm.commands.variants import Variant
from mm.config.schema import Config
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo, init_distributed
from mm.ranks.memory import forget_peak
from mm.train.trainer import open_feed, train_step


@dataclass
class Run:
    """One layout of a comparison. rounds: by round, the seconds of its timed steps, warm-up left out."""

    name: str
    blueprint: Blueprint
    layout: dict[str, Any]
    rounds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[dict[str, float]] = field(default_factory=list)
    boundary_bytes: list[int] = field(default_factory=list)
    peak_memory_bytes: int = 0

    @property
    def step_s(self) -> list[float]:
        """Seconds of every timed step."""
        return [seconds for steps in self.rounds for seconds in steps]


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
                if rank.rank == 0:
                    ms = statistics.median(run.rounds[-1]) * 1e3
                    print(f"round {number + 1}/{rounds}, {run.name}: {ms:.1f} ms a step", flush=True)
    finally:
        dist.destroy_process_group()
    if rank.rank == 0:
        report = {"runs": [summary(run, runs[0]) for run in runs]}
        if json_out is not None:
            json_out.write_text(json.dumps(report, indent=1))
        console = RichConsole()
        if not console.is_terminal:  # a line a layout where nobody looks at a terminal
            console.width = WIDE
        console.print(table(report))


def _round(run: Run, rank: RankInfo, steps: int, *, first: bool) -> None:
    cfg = run.blueprint.cfg
    forget_peak(rank.device)  # of the layouts before, whose order must not matter
    run.rounds.append([])
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
        run.rounds[-1].append(seconds)
        run.tokens.append(record["tokens"])
        run.boundary_bytes.append(sum(v["bytes"] for v in record["boundary"].values()))
    if first:
        run.losses.append(record["loss"])
        run.grad_norms.append(record["grad_norm_by_module"])
    run.peak_memory_bytes = max(run.peak_memory_bytes, record["peak_memory_bytes"])


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |a - b| / |b| over pairs; 0 where both are 0."""
    return max((abs(a - b) / abs(b) if b else abs(a) for a, b in zip(ours, theirs, strict=True)), default=0.0)


# Student's t by degrees of freedom: 95 % of a mean's estimates lie within so many of its standard errors.
# What comes after the last is a little less.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
WIDE = 200  # columns of a table that goes to a file
FEWEST = 3  # ratios that an interval takes


def speedup_interval(run: Run, base: Run) -> tuple[float, float] | None:
    """Between which two numbers the true speed-up lies, at 95 % confidence; None where there is too little to
    tell.

    Equal steps of equal rounds do the same work, and rounds are interleaved, so that their ratios know
    neither the data nor the machine's moods. Rounds are independent, the steps of one are less so: they count
    apart only where there are too few rounds.
    """
    ratios = [
        [math.log(theirs / ours) for ours, theirs in zip(mine, others, strict=True)]
        for mine, others in zip(run.rounds, base.rounds, strict=True)
    ]
    logs = [statistics.mean(r) for r in ratios if r]
    if len(logs) < FEWEST:
        logs = [x for r in ratios for x in r]
    if len(logs) < FEWEST:
        return None
    t = STUDENT[min(len(logs) - 1, len(STUDENT)) - 1]
    middle, error = statistics.mean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle - error), math.exp(middle + error)


def verdict(interval: tuple[float, float] | None) -> str:
    """What an interval of the speed-up says."""
    if interval is None:
        return "too few steps"
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "within noise"


def summary(run: Run, base: Run) -> dict[str, Any]:
    """One entry of the comparison's JSON (docs: layouts)."""
    times = run.step_s or [float("nan")]
    interval = speedup_interval(run, base) if run is not base else (1.0, 1.0)
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
        "speedup_interval": None if interval is None else list(interval),
        "speedup_verdict": verdict(interval) if run is not base else "baseline",
    }


def table(report: dict[str, Any]) -> Table:
    """The comparison for people."""
    out = Table(title="same model, data, seed and batches; first row is the baseline", box=SIMPLE_HEAD)
    headings = ("step ms (min)", "tokens/s", "memory MiB", "boundary KiB/step", "loss diff", "grad norm diff")
    # Names are folded, never cut: layouts are often called alike but for their ends.
    out.add_column("layout", overflow="fold")
    for heading in (*headings, "speed-up", "95 % interval"):
        out.add_column(heading, justify="right", overflow="fold")
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
            _interval_text(run),
        )
    return out


def _interval_text(run: dict[str, Any]) -> str:
    interval, said = run["speedup_interval"], run["speedup_verdict"]
    if interval is None or said == "baseline":
        return said
    noise = ", noise" if said == "within noise" else ""
    return f"{interval[0]:.2f} to {interval[1]:.2f}{noise}"
