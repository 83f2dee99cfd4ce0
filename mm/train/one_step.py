"""One training step of a job, from its feed: data, forward and backward, update, metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mm.checkpoint.state import Resumed
from mm.config.outline import SINK
from mm.order.skips import Skips
from mm.plan.batches import Batches
from mm.plan.flops import step_flops
from mm.plan.step_plan import Imbalance, StepPlan
from mm.ranks.feed import Feed, FeedOptions
from mm.ranks.job import Data, Job
from mm.ranks.skipped import Listener
from mm.report.timeline import draw_measured
from mm.train.guard import Guard
from mm.train.metrics import StepMetrics
from mm.train.statistics import Watch
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
from parallel.schedule import Record

AT_START = Resumed()


def open_feed(job: Job, data: Data, state: Resumed = AT_START, *, listener: Listener | None = None) -> Feed:
    """The steps of a job over a data set. state: where it resumes."""
    cfg = job.blueprint.cfg
    skips = state.drawn.going_on(state.step, Skips.parse(cfg.data.skip))
    options = FeedOptions(
        Batches.of(cfg, data.index, (state.step, state.drawn.cursor), skips),
        cfg.data.prefetch,
        state.drawn,
        workers=cfg.data.workers,
        item_timeout_s=cfg.data.item_timeout_s,
        max_skipped=cfg.data.max_skipped,
    )
    schedules = job.blueprint.schedules
    return Feed(
        data.index,
        data.assembler,
        job.control,
        options,
        schedules=schedules,
        bad=state.bad_samples,
        listener=listener,
    )


def devices(job: Job) -> int:
    """How many ranks of the job host a module."""
    return len({r for layout in job.blueprint.layouts.values() for r in layout.ranks})


def train_step(
    job: Job,
    feed: Feed,
    step: int,
    *,
    stop: bool = False,
    guard: Guard | None = None,
    saving: Callable[[], float] = lambda: 0.0,
) -> StepMetrics:
    """One step: data, forward and backward, update. step counts from 0; stop: this rank was asked to end;
    guard: of the run, None: a step that is not finite raises NonFinite; saving: gives a number that goes with
    the message at the step's end, the largest of all ranks is in the metrics."""
    cfg = job.blueprint.cfg
    record = job.rank.record
    record.step = step + 1
    with record.doing("data", feed.patience_s):
        prepared, waited = feed.next(step, cfg.train.steps)
    records: list[Record] = []
    drawn = cfg.run.trace == step + 1
    every = cfg.train.statistics
    watch = Watch(job) if every and (step + 1) % every == 0 else None
    result = run_step(job, prepared, train=True, observe=records.append if drawn else None, watch=watch)
    if drawn:
        schedule = job.blueprint.schedule(prepared.plan.active)
        draw_measured(schedule, records, job.control, job.rank.rank, Path(cfg.run.dir), step + 1)
    lr = learning_rate(cfg.train, step)
    with record.doing("update", 0.0):
        said = [saving(), *feed.notice(step + 1)]
        update = finish_step(job, result, step, lr, stop=stop, notice=said, guard=guard)
    feed.hear(step + 1, update.notices[:, 1:])
    subsets = prepared.plan.subsets
    return StepMetrics(
        step=step + 1,
        loss=update.loss,
        tokens=prepared.plan.tokens,
        lr=lr,
        grad_norm=update.grad_norm,
        grad_norm_by_module=update.grad_norm_by_module,
        flops_by_module=step_flops(job.blueprint, prepared.plan),
        peak_memory_bytes=update.peak_memory_bytes,
        data_s=waited,
        seconds_by_module=update.compute_s,
        waited_s_by_module=update.waited_s,
        slowest_rank=update.slowest,
        optimizer_s=update.optimizer_s,
        boundary=update.boundary,
        objectives=update.objectives,
        loss_by_modality=subsets.losses(update.losses, "modality"),
        loss_by_source=subsets.losses(update.losses, "source"),
        drawn_by_source=feed.drawn.by_source,
        imbalance=load_imbalance(prepared.plan),
        skipped_items=len(feed.bad),
        stop=update.stop,
        layers=update.layers,
        batch=None if feed.skips.batch(step) == step else feed.skips.batch(step) + 1,
        left_out=update.left_out,
        saving=float(update.notices[:, 0].max()),
    )


def load_imbalance(plan: StepPlan) -> dict[str, Imbalance]:
    """By module, averages over the micro-batches in which it has items, or samples; left out where it never
    has."""
    out = {}
    for module in (*plan.items, SINK):
        found = [i for i in plan.imbalance(None if module == SINK else module) if i is not None]
        if found:
            n = len(found)
            out[module] = Imbalance(sum(i.dealt for i in found) / n, sum(i.by_sample for i in found) / n)
    return out
