"""Activation memory that a plan holds at most, by rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.schedule.action import Kind
from parallel.schedule.plan import SchedulePlan


@dataclass(frozen=True)
class Memory:
    """Bytes (or any unit) on one rank.

    activation: by module, or (module, stage): what a forward keeps for one micro-batch until its backward.
        A module that is in neither counts 1, so that the unit is activations of a stage.
    weight_share: the share that BACKWARD_WEIGHT still needs after BACKWARD_INPUT; all of it by default.
    load: by (module, micro-batch), a factor, for ragged batches.
    """

    activation: Mapping[str | tuple[str, int], float] = field(default_factory=dict)
    weight_share: float = 1.0
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def of(self, module: str, stage: int, microbatch: int) -> float:
        """What one stage keeps of one micro-batch."""
        one = self.activation.get((module, stage), self.activation.get(module, 1.0))
        return one * self.load.get((module, microbatch), 1.0)


@dataclass(frozen=True)
class Peak:
    """The most that ranks hold at once. ranks: those that do; held: at that moment, by module; action: the
    forward that reaches it."""

    bytes: float
    ranks: tuple[int, ...]
    held: Mapping[str, float]
    action: str


def peaks(plan: SchedulePlan, memory: Memory | None = None) -> tuple[Peak, ...]:
    """The high-water mark of each program, from its order alone.

    Micro-batches in which a source has no items hold nothing of it.
    """
    memory = memory or Memory()
    return tuple(_peak(plan, p, memory) for p in range(len(plan.programs)))


def held_microbatches(plan: SchedulePlan, module: str) -> int:
    """For how many micro-batches any rank holds activations of a module's stage at once, at most."""
    only = Memory({m: float(m == module) for m in plan.modules})
    return max((round(peak.bytes) for peak in peaks(plan, only)), default=0)


def check_limit(
    plan: SchedulePlan, limit: float, memory: Memory | None = None, *, nearest: str = ""
) -> tuple[Peak, ...]:
    """The peaks, refused with ValueError where one is above `limit`. nearest: what works, for the message."""
    found = peaks(plan, memory)
    worst = max(found, key=lambda peak: peak.bytes)
    if worst.bytes > limit:
        parts = ", ".join(f"{m} {held:g}" for m, held in worst.held.items() if held)
        raise ValueError(
            f"schedule {plan.kind}: rank {worst.ranks[0]} holds activations of {worst.bytes:g} ({parts}) at "
            f"{worst.action}, given a bound of {limit:g}; nearest: {nearest}a bound of {worst.bytes:g}"
        )
    return found


def _peak(plan: SchedulePlan, p: int, memory: Memory) -> Peak:
    held = dict.fromkeys(plan.modules, 0.0)
    total = best = 0.0
    at, then = None, dict(held)
    for a in plan.programs[p]:
        if a.kind not in _GROWS:
            continue
        covered = range(a.microbatch, a.microbatch + a.span)
        if a.module != plan.sink:
            covered_active = [i for i in covered if a.module in plan.active[i]]
        else:
            covered_active = list(covered)
        amount = sum(memory.of(a.module, a.stage, i) for i in covered_active)
        if not _keeps(plan, a.module, covered):
            continue
        if a.kind is Kind.FORWARD:
            total, held[a.module] = total + amount, held[a.module] + amount
            if total > best:
                best, at, then = total, a, dict(held)
            continue
        split = not plan.modules[a.module].frozen
        share = {
            Kind.BACKWARD: 1.0,
            Kind.BACKWARD_INPUT: 1 - memory.weight_share if split else 1.0,
            Kind.BACKWARD_WEIGHT: memory.weight_share,
        }[a.kind]
        total, held[a.module] = total - amount * share, held[a.module] - amount * share
    return Peak(best, plan.ranks_of[p], then, str(at or "nothing"))


_GROWS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def _keeps(plan: SchedulePlan, module: str, covered: range) -> bool:
    """Whether a forward keeps activations at all: a backward follows."""
    if module == plan.sink:
        return plan.needs_backward(covered[0])
    return plan.train and not plan.modules[module].frozen
