"""The training job of one rank, from config to final table."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mm.checkpoint import state as checkpoint
from mm.checkpoint.resume import begin, find
from mm.checkpoint.weights import start_from
from mm.config.schema import resolve_yaml
from mm.data.index import Index, Sample
from mm.plan.blueprint import Blueprint
from mm.plan.flops import step_flops
from mm.plan.step_plan import StepPlan
from mm.ranks.feed import Feed
from mm.ranks.job import Data, Job, build_job, open_data, open_indexes
from mm.ranks.launch import RankInfo, init_distributed
from mm.ranks.stop import Asked, Stop
from mm.report.header import header, memory_warning
from mm.report.plan_json import plan_json
from mm.report.timeline import draw_measured
from mm.train.console import Console
from mm.train.evaluate import Evaluation, blind_guess, evaluate
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
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
    indexes = open_indexes(blueprint)
    about = _introduce(blueprint, rank, indexes)
    job = build_job(blueprint, rank)
    data = {name: open_data(job, index) for name, index in indexes.items()}
    train_data, eval_data = data["training"], data.get("evaluation")
    run_dir = Path(cfg.run.dir)
    first, bad = 0, frozenset[int]()
    resume = find(cfg, run_dir, rank)
    if resume is not None:
        state = checkpoint.load(job, train_data.index, resume)
        first, bad = state["step"], frozenset(state["bad_samples"])
    elif cfg.checkpoint.weights is not None:
        start_from(job, Path(cfg.checkpoint.weights))
    aside = begin(run_dir, rank, resume, first)
    console = Console(
        run_dir, cfg.train.steps, first=first, lead=rank.rank == 0, tensorboard=cfg.run.tensorboard
    )
    if rank.rank == 0:
        (run_dir / "config.yaml").write_text(resolve_yaml(cfg))
        (run_dir / "plan.json").write_text(plan_json(blueprint, train_data.index))
        console.note(about)
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
    for opened in data.values():
        opened.assembler.reader.close()
    job.close()


def _introduce(blueprint: Blueprint, rank: RankInfo, indexes: Mapping[str, Index]) -> str:
    """Say what the run is, on one rank, before anything takes memory; returns it."""
    if rank.rank:
        return ""
    about = header(blueprint, indexes, str(rank.device), dist.get_backend())
    print(about, flush=True)
    warning = memory_warning(blueprint, rank.device.type, rank.node_size or rank.world)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return about if warning is None else f"{about}\nwarning: {warning}"


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
                console.evaluation(done, run_evaluation(job, eval_data, stop, console.warn))
        if eval_data is not None:
            result = run_evaluation(job, eval_data, stop, console.warn)
            console.evaluation(steps, result)
            if job.rank.rank == 0:
                console.lift_table(
                    result, blind_guess(eval_samples(job, eval_data), eval_data.assembler.reader)
                )
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
        "seconds_by_module": dict(update.compute_s),
        "optimizer_s": update.optimizer_s,
        "boundary": {m: dict(v) for m, v in update.boundary.items()},
        "objectives": dict(update.objectives),
        "imbalance": {m: dict(v) for m, v in load_imbalance(prepared.plan).items()},
        "skipped_items": len(feed.bad),
        "stop": update.stop,
    }


def load_imbalance(plan: StepPlan) -> dict[str, dict[str, float]]:
    """By encoder: FLOPs of its costliest dp rank over the mean, as dealt and as if dealt by sample; averages
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


def run_evaluation(job: Job, data: Data, stop: Stop, warn: Callable[[str], None]) -> Evaluation:
    """Evaluate the first eval.samples held-out samples; raises Asked where `stop` is asked on some rank."""
    return evaluate(job, data, eval_samples(job, data), job.blueprint.cfg.run.seed, stop, warn)


def eval_samples(job: Job, data: Data) -> list[Sample]:
    """The first eval.samples held-out samples that are not left out."""
    return data.index.usable[: job.blueprint.cfg.eval.samples]
