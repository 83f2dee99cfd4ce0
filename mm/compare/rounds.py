"""Trains the same model on the same batches under several layouts, in turn, and times each."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from rich.console import Console as RichConsole

from mm.compare.summary import WIDE, Measured, summarise, table
from mm.compare.variants import Variant
from mm.config.schema import Config
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo, init_distributed
from mm.ranks.memory import reset_peak
from mm.train.garbage import set_aside
from mm.train.trainer import open_feed, train_step


@dataclass
class Run:
    """One layout of a comparison: its job, and what its rounds have measured so far."""

    blueprint: Blueprint
    measured: Measured


def make_runs(variants: Sequence[Variant], world: int) -> list[Run]:
    """A run for each layout; raises Refused, naming its file, for any that does not work."""
    runs = []
    for variant in variants:
        try:
            blueprint = draw_up(variant.cfg, world)
        except Refused as error:
            raise Refused(f"{variant.path}: {error}") from error
        runs.append(Run(blueprint, Measured(variant.name, variant.layout)))
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
                    ms = statistics.median(run.measured.rounds[-1]) * 1e3
                    print(f"round {number + 1}/{rounds}, {run.measured.name}: {ms:.1f} ms a step", flush=True)
    finally:
        dist.destroy_process_group()
    if rank.rank == 0:
        summaries = [summarise(run.measured, runs[0].measured) for run in runs]
        if json_out is not None:
            json_out.write_text(json.dumps({"runs": [asdict(s) for s in summaries]}, indent=1))
        console = RichConsole()
        if not console.is_terminal:  # in a file each layout gets one line
            console.width = WIDE
        console.print(table(summaries))


def _round(run: Run, rank: RankInfo, steps: int, *, first: bool) -> None:
    cfg = run.blueprint.cfg
    reset_peak(rank.device)  # that of the layouts before: their order must not matter
    run.measured.rounds.append([])
    index = open_index(run.blueprint, cfg.data.train, cfg.base)
    job = build_job(run.blueprint, rank)
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        with set_aside():
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
    metrics = train_step(job, feed, step)
    dist.barrier()
    seconds = time.perf_counter() - start
    measured = run.measured
    if step > 0:  # the first step of a round pays for caches and lazy set-up
        measured.rounds[-1].append(seconds)
        measured.tokens.append(metrics.tokens)
        measured.boundary_bytes.append(sum(edge.bytes for edge in metrics.boundary.values()))
    if first:
        measured.losses.append(metrics.loss)
        measured.grad_norms.append(metrics.grad_norm_by_module)
    measured.peak_memory_bytes = max(measured.peak_memory_bytes, metrics.peak_memory_bytes)
