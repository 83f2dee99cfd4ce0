"""The training job of one rank, from config to final table."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mm import checkpoint
from mm.blueprint import Blueprint
from mm.config import resolve_yaml
from mm.console import Console
from mm.convert import start_from
from mm.evaluate import Evaluation, evaluate
from mm.feed import Feed
from mm.flops import step_flops
from mm.job import Data, Job, build_job, open_data, open_index
from mm.launch import RankInfo, init_distributed
from mm.plan import StepPlan
from mm.plan_text import plan_json
from mm.resume import begin, find
from mm.step import run_step
from mm.stop import Asked, Stop
from mm.timeline import draw_measured
from mm.update import finish_step, learning_rate
from parallel.schedule import Record


def train(blueprint: Blueprint, stop: Stop) -> None:
    """Train on this rank until done or `stop` is asked; raises PolyrankError where it cannot go on."""
    rank = init_distributed(blueprint.cfg)
    try:
        train_on(blueprint, rank, stop)
        gc.collect()  # modules hold groups, in circles
    finally:
        dist.destroy_process_group()


def train_on(blueprint: Blueprint, rank: RankInfo, stop: Stop) -> None:
    """The same in a default process group that is there already."""
    cfg = blueprint.cfg
    indices = [open_index(blueprint, p, cfg.base) for p in (cfg.data.train, cfg.data.eval) if p]
    job = build_job(blueprint, rank)
    train_data, *others = (open_data(job, index) for index in indices)
    eval_data = others[0] if others else None
    run_dir = Path(cfg.run.dir)
    first, bad = 0, frozenset[int]()
    resume = find(cfg, run_dir, rank)
    if resume is not None:
        state = checkpoint.load(job, train_data.index, resume)
        first, bad = state["step"], frozenset(state["bad_samples"])
    elif cfg.checkpoint.weights is not None:
        start_from(job, Path(cfg.checkpoint.weights))
    aside = begin(run_dir, rank, resume, first)
    console = Console(run_dir, cfg.train.steps, first=first, lead=rank.rank == 0)
    if rank.rank == 0:
        (run_dir / "config.yaml").write_text(resolve_yaml(cfg))
        (run_dir / "plan.json").write_text(plan_json(blueprint, train_data.index))
    if aside:
        console.info(f"checkpoints that this run does not follow: {', '.join(p.name for p in aside)}")
    if resume is not None:
        console.info(f"resumed from {resume} at step {first}")
    feed = open_feed(job, train_data, bad=bad, warn=console.warn)
    try:
        _loop(job, feed, eval_data, console, run_dir, first, stop)
    finally:
        feed.close()
        console.close()
    job.control.any(False)  # all have come to the end: nobody closes what another still uses
    for data in (train_data, *others):
        data.assembler.reader.close()
    job.close()


def open_feed(
    job: Job, data: Data, *, bad: Collection[int] = (), warn: Callable[[str], None] = print
) -> Feed:
    """The steps of a job over a data set. bad: samples known to be unreadable."""
    cfg = job.blueprint.cfg
    return Feed(
        data.index,
        data.assembler,
        job.control,
        seed=cfg.run.seed,
        global_batch=cfg.train.global_batch,
        ahead=cfg.data.prefetch,
        bad=bad,
        warn=warn,
    )


def _loop(
    job: Job, feed: Feed, eval_data: Data | None, console: Console, run_dir: Path, first: int, stop: Stop
) -> None:
    cfg = job.blueprint.cfg
    steps, every = cfg.train.steps, cfg.checkpoint.every
    done = saved = first
    try:
        if job.control.any(stop.asked):  # while the run was made ready
            raise Asked
        while done < steps:
            start = time.perf_counter()
            record = train_step(job, feed, done, stop=stop.asked)
            asked = record.pop("stop")
            record["step_s"] = time.perf_counter() - start
            console.step(add_rates(job, record))
            done += 1
            if every and (asked or done % every == 0 or done == steps):
                checkpoint.save(job, feed.index, run_dir, done, feed.bad)
                saved = done
                asked = asked or job.control.any(stop.asked)  # while it was written
            if asked:
                raise Asked
            if eval_data is not None and cfg.eval.every and done % cfg.eval.every == 0 and done < steps:
                console.evaluation(done, run_evaluation(job, eval_data, stop))
        if eval_data is not None:
            result = run_evaluation(job, eval_data, stop)
            console.evaluation(steps, result)
            console.lift_table(result, floor=math.log(10.0))
    except Asked:
        if every and saved < done:
            checkpoint.save(job, feed.index, run_dir, done, feed.bad)
        console.info(f"stopped by a signal after step {done}")


def train_step(job: Job, feed: Feed, step: int, *, stop: bool = False) -> dict[str, Any]:
    """One step: data, forward and backward, update. Returns its metrics, equal on all ranks but for times."""
    cfg = job.blueprint.cfg
    prepared, waited = feed.next(step, cfg.train.steps)
    records: list[Record] = []
    drawn = cfg.run.trace == step + 1
    result = run_step(job, prepared, train=True, observe=records.append if drawn else None)
    if drawn:
        schedule = job.blueprint.schedule(prepared.plan.active)
        draw_measured(schedule, records, job.control, job.rank.rank, Path(cfg.run.dir), step + 1)
    lr = learning_rate(cfg.train, step)
    update = finish_step(job, result, step, lr, stop=stop)
    return {
        "step": step + 1,
        "loss": update.loss,
        "tokens": prepared.plan.tokens,
        "lr": lr,
        "grad_norm": update.grad_norm,
        "grad_norm_by_module": dict(update.grad_norm_by_module),
        "flops_by_module": step_flops(job.blueprint, prepared.plan),
        "peak_memory_bytes": update.peak_memory_bytes,
        "data_s": waited,
        "seconds_by_module": dict(update.seconds),
        "boundary": {m: dict(v) for m, v in update.boundary.items()},
        "objectives": {k: v / max(1, prepared.plan.supervised) for k, v in update.objectives.items()},
        "imbalance": {m: dict(v) for m, v in load_imbalance(prepared.plan).items()},
        "skipped_items": len(feed.bad),
        "stop": update.stop,
    }


def load_imbalance(plan: StepPlan) -> dict[str, dict[str, float]]:
    """By encoder: FLOPs of its costliest lane over the mean, as dealt and as if dealt by sample; averages
    over the micro-batches in which it has items."""
    out = {}
    for m in plan.microbatches[0].edges:
        loads = [mb.edges[m].load for mb in plan.microbatches if mb.edges[m].items]
        if loads:
            dealt, by_sample = (sum(column) / len(loads) for column in zip(*loads, strict=True))
            out[m] = {"dealt": dealt, "by_sample": by_sample}
    return out


def add_rates(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """Rates from a step's metrics and its wall time."""
    record["tokens_per_s"] = record["tokens"] / record["step_s"]
    flops = sum(record["flops_by_module"].values())
    devices = len({r for layout in job.blueprint.layouts.values() for r in layout.ranks})
    record["tflops_per_device"] = flops / record["step_s"] / devices / 1e12
    return record


def run_evaluation(job: Job, data: Data, stop: Stop) -> Evaluation:
    """Evaluate the first eval.samples held-out samples; raises Asked where `stop` is asked on some rank."""
    cfg = job.blueprint.cfg
    return evaluate(job, data, data.index.samples[: cfg.eval.samples], cfg.run.seed, stop)
