"""A step of one rank: its FLOPs and messages, and the most memory that it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.count.memory import walk
from mm.predict.count.rank_plan import RankPlan, Sent
from parallel.schedule.action import COMPUTE


@dataclass(frozen=True)
class RankCounts:
    """A step of one rank. flops: by module. sent: bytes of the larger side of its calls, summed. peak: bytes
    at the peak of memory, and kinds: of what, as mm.virtual names them."""

    flops: Mapping[str, float]
    sent: Mapping[Sent, float]
    peak: float
    kinds: Mapping[str, float]
    during: str


def count_rank(blueprint: Blueprint, plan: StepPlan, rank: int, *, host: bool = False) -> RankCounts:
    """Count a rank's step; exact in which documents and items it has. For many ranks use count_job().

    host: of RankPlan.
    """
    counted = RankPlan(blueprint, plan, rank, host=host)
    flops: Counter[str] = Counter()
    sent: Counter[Sent] = Counter()
    for a in counted.actions:
        work = counted.work(a)
        flops[a.module] += work.flops if a.kind in COMPUTE else 0.0  # type: ignore[assignment]
        for m in work.messages:
            sent[Sent(m.op, counted.members(m.group))] += m.bytes * m.times  # type: ignore[assignment]
        for one, size in counted.between(a):
            sent[one] += size  # type: ignore[assignment]
    for m in counted.over_data():
        sent[Sent(m.op, counted.members(m.group))] += m.bytes * m.times  # type: ignore[assignment]
    held = walk(counted)
    return RankCounts(dict(flops), dict(sent), held.total, held.kinds, held.during)
