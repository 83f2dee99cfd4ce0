"""Gathers and sums over data ranks are started by a step, and waited for by what needs them alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from mm.ranks.feed import Prepared
from mm.ranks.job import Job
from mm.train.step import run_step
from parallel.schedule import Action, Kind, Record
from parallel.schedule.action import COMPUTE
from parallel.sharding.param import local
from tests.mm.harness import running, small

LATE, PATIENCE = 0.3, timedelta(seconds=20)  # seconds; a rank that waits for good fails after PATIENCE


class Seen(NamedTuple):
    """A step. ends: of its actions, then of the step, in seconds. gradients: by parameter, its shard's sum of
    squares."""

    ends: list[float]
    gradients: dict[str, float]


class Turn:
    """What rank 0 passes to rank 1, which then is late."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(1)

    def give(self) -> None:
        dist.send(self.tensor, 1, tag=77)

    def take(self) -> None:
        work = dist.irecv(self.tensor, 0, tag=77)
        assert work is not None
        work.wait(PATIENCE)
        time.sleep(LATE)


def step(job: Job, prepared: Prepared, before: Callable[[int], None] = lambda _: None) -> Seen:
    """before: called with the index of each action before it, and with their number after the last one."""
    for part in job.modules():
        part.zero_grad()
    ends: list[float] = []

    def observe(record: Record) -> None:
        ends.append(record.end)
        before(len(ends))

    before(0)
    run_step(job, prepared, train=True, observe=observe)
    squares = {
        f"{m}.{stage}.{name}": float(local(p.grad).square().sum())
        for m, parts in job.parts.items()
        for stage, part in parts.items()
        for name, p in part.named_parameters()
        if p.grad is not None
    }
    return Seen([*ends, time.perf_counter()], squares)


def late_steps(raw: dict[str, Any]) -> tuple[list[Action], Seen, Seen, Seen]:
    """Actions, and three steps of one batch: nobody is late; rank 1 starts its gathers when rank 0 is at its
    first computation; rank 1 starts its last sum when rank 0 has done its last action."""
    with running(raw) as (job, feed):
        prepared, _ = feed.next(0, 1)
        actions = job.blueprint.schedule(prepared.plan.active).actions(job.rank.rank)
        first = next(k for k, a in enumerate(actions) if a.kind in COMPUTE)
        final = max(k for k, a in enumerate(actions) if a.last)
        turn, mine = Turn(), job.rank.rank

        def in_gather(at: int) -> None:
            if mine == 0 and at == first:
                turn.give()
            if mine == 1 and at == 0:
                turn.take()

        def in_sum(at: int) -> None:
            if mine == 0 and at == len(actions):
                turn.give()
            if mine == 1 and at == final:
                turn.take()

        plain = step(job, prepared)
        return list(actions), plain, step(job, prepared, in_gather), step(job, prepared, in_sum)


def test_a_late_data_rank_is_waited_for_by_what_needs_it(ranks: Any) -> None:
    """If rank 0 waited in the actions in between, rank 1 would never come."""
    layout = {m: {"data_parallel": "step"} for m in ("vision", "audio", "llm")}
    raw = small(layout=layout, schedule={"microbatches": 2})
    by_rank = ranks(2, late_steps, raw, timeout=60)
    actions, _, gather, sums = by_rank[0]
    first = next(k for k, a in enumerate(actions) if a.kind in COMPUTE)
    assert actions[0].kind is Kind.GATHER
    assert gather.ends[first] - gather.ends[first - 1] > LATE - 0.05
    assert sums.ends[-1] - sums.ends[-2] > LATE - 0.05
    for _, plain, *late in by_rank:
        assert plain.gradients and all(s.gradients == pytest.approx(plain.gradients, rel=1e-12) for s in late)
