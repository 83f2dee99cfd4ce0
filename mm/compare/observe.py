"""Watches single steps of a job: when each action ran and for how long it computed, and what memory held.

These steps follow the timed ones of a round, so that watching slows none of those.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from mm.compare.result import MEMORY_KINDS, ActionSeconds, Arrow, Bar, RankResult, Timeline
from mm.plan.flops import step_flops
from mm.ranks.feed import Feed
from mm.ranks.job import Job
from mm.report.timeline import gather_records
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
from mm.virtual.ledger import KINDS
from mm.virtual.recorder import Recorder
from mm.virtual.run import group_names, record_step
from parallel.schedule import Record, SchedulePlan
from parallel.schedule.drawing.chart import Chart, measured

QUEUED = Path("/proc/thread-self/schedstat")  # of this thread: ns computed, ns waited for a core, slices
# What the ledger of a step distinguishes, by what a comparison shows.
SHOWN = {
    "parameters": "weights",
    "gathered_parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
}


@dataclass(frozen=True)
class Observed:
    """One step as it ran: by rank and as a drawing. flops: by module, over all ranks."""

    flops: dict[str, float]
    ranks: list[RankResult]
    timeline: Timeline

    @property
    def step_s(self) -> float:
        """Of the slowest rank."""
        return max(rank.step_s for rank in self.ranks)


@dataclass
class Clock:
    """Takes the records of a step. processor: of each, seconds that this thread computed for it. queued: that
    it waited for a core.

    On an accelerator each action is waited for, so that its end is when its work was done, and processor
    seconds say nothing.
    """

    device: torch.device
    records: list[Record] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    last: tuple[float, float] = field(default_factory=lambda: (time.thread_time(), queued_s()))

    def __call__(self, record: Record) -> None:
        """Note an action that has just been handled."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
            record = record._replace(end=time.perf_counter())
        now = time.thread_time(), queued_s()
        self.records.append(record)
        self.processor.append(now[0] - self.last[0])
        self.queued.append(now[1] - self.last[1])
        self.last = now


def observe_step(job: Job, feed: Feed, step: int) -> Observed:
    """Train one step and watch it; every rank calls this and gets the same."""
    cfg, rank = job.blueprint.cfg, job.rank
    begin, thread = time.perf_counter(), time.thread_time()
    prepared, waited = feed.next(step, cfg.train.steps)
    clock = Clock(rank.device)
    result = run_step(job, prepared, train=True, observe=clock)
    update = time.perf_counter()
    lr = learning_rate(cfg.train, step)
    done = finish_step(job, result, step, lr, notice=feed.notice(step + 1))
    end, thread = time.perf_counter(), time.thread_time() - thread
    feed.hear(step + 1, done.notices)
    schedule = job.blueprint.schedule(prepared.plan.active)
    numbers = job.control.gather([waited, end - update, end - begin, thread])
    most = max(map(len, schedule.programs))
    spent = np.stack(
        [
            job.control.gather([*seconds, *[0.0] * (most - len(seconds))])
            for seconds in (clock.processor, clock.queued)
        ],
        axis=-1,
    )  # [world, actions, 2]
    records = gather_records(schedule, clock.records, job.control)
    chart = measured(schedule, records)
    bubbles = dict(zip(sorted(records), chart.rows, strict=True))
    on_cpu = rank.device.type == "cpu"
    found = []
    for r in range(rank.world):
        data_s, update_s, step_s, busy = numbers[r].tolist()
        one = RankResult(
            rank=r,
            hosts=bubbles[r].modules if r in bubbles else "",
            actions=_by_action(records.get(r, ()), spent[r], on_cpu),
            data_s=data_s,
            update_s=update_s,
            step_s=step_s,
            bubble=bubbles[r].bubble if r in bubbles else 1.0,
            idle=max(0.0, 1 - busy / step_s) if on_cpu else None,
            memory={},
        )
        found.append(one)
    return Observed(
        flops=step_flops(job.blueprint, prepared.plan),
        ranks=found,
        timeline=timeline_of(chart, schedule, sorted(records), step),
    )


def queued_s() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the system does not count them."""
    try:
        return int(QUEUED.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _by_action(records: Sequence[Record], spent: np.ndarray, on_cpu: bool) -> list[ActionSeconds]:
    """A rank's seconds by module and kind. spent: of each record, seconds computed and queued [n, 2]."""
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(4))
    for (action, start, end, ready), own in zip(records, spent, strict=False):
        sums[action.module, action.kind.value] += (end - start, max(0.0, ready - start), *own)
    return [
        ActionSeconds(module, kind, seconds, waited, *((spent, queued) if on_cpu else (None, None)))
        for (module, kind), (seconds, waited, spent, queued) in ((key, x.tolist()) for key, x in sums.items())
    ]


def timeline_of(chart: Chart, schedule: SchedulePlan, ranks: Sequence[int], step: int) -> Timeline:
    """A chart of measured actions as plain data. ranks: by row. step: counts from 0."""
    bars = [
        Bar(
            row=b.row,
            start=b.start,
            end=b.end,
            kind=b.action.kind.value,
            module=b.action.module,
            stage=b.action.stage,
            microbatch=b.action.microbatch,
            span=b.action.span,
            chunk=b.chunk,
            half=b.half,
        )
        for b in chart.bars
    ]
    arrows = [
        Arrow(a.kind.value, a.module, a.source, a.target, a.start, bar)
        for a, bar in zip(chart.arrows, chart.waits, strict=True)
    ]
    return Timeline(
        step=step + 1,
        seconds=chart.seconds,
        schedule=schedule.kind,
        modules=list(chart.modules),
        ranks=list(ranks),
        bars=bars,
        arrows=arrows,
    )


def observe_memory(job: Job, feed: Feed, step: int) -> list[dict[str, int]]:
    """Train one step and follow every storage on the device; by rank, its peak by MEMORY_KINDS.

    Every rank calls this and gets the same. It is to be the last step of a job: the next step is not agreed.
    """
    names = group_names(job)
    recorder = Recorder(
        job.rank.device,
        job.rank.rank,
        values=None,
        names=lambda group: names.get(group.group_name, group.group_name),
    )
    with recorder:
        record_step(job, recorder, lambda: feed.next(step, job.blueprint.cfg.train.steps)[0])
    kinds = recorder.ledger.memory().by_kind
    table = job.control.gather([float(kinds[kind]) for kind in KINDS])
    out = []
    for row in table:
        held = dict.fromkeys(MEMORY_KINDS, 0)
        for kind, size in zip(KINDS, row.tolist(), strict=True):
            held[SHOWN.get(kind, "other")] += int(size)
        out.append(held)
    return out


def typical(observed: Sequence[Observed], memory: Sequence[Mapping[str, int]]) -> Observed:
    """The step of median length, with the memory of each rank."""
    one = sorted(observed, key=lambda o: o.step_s)[(len(observed) - 1) // 2]
    return replace(
        one, ranks=[replace(rank, memory=held) for rank, held in zip(one.ranks, memory, strict=True)]
    )
