"""Activation memory that a plan holds at most, by rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parallel.schedule.action import BACKWARD, BACKWARD_WEIGHT, COMPUTE, FORWARD
from parallel.schedule.plan import SchedulePlan


@dataclass(frozen=True)
class Memory:
    """Bytes (or any unit) on one rank.

    activation: by module, or (module, stage): what a forward keeps for one micro-batch until its backward.
        A module that is in neither counts 1, so that the unit is activations of a stage.
    weight_share: the share that BACKWARD_WEIGHT still needs after BACKWARD_INPUT; by default all of it, which
        is a bound.
    load: by (module, micro-batch), a factor, for ragged batches.
    """

    activation: Mapping[str | tuple[str, int], float] = field(default_factory=dict)
    weight_share: float = 1.0
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def of(self, module: str, stage: int) -> float:
        """What one stage keeps of a micro-batch of load 1."""
        return self.activation.get((module, stage), self.activation.get(module, 1.0))


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
    loads = _loads(plan, memory)
    return tuple(_peak(plan, p, memory, loads) for p in range(len(plan.programs)))


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


def _peak(plan: SchedulePlan, p: int, memory: Memory, loads: Mapping[str, Sequence[float]]) -> Peak:
    held = dict.fromkeys(plan.modules, 0.0)
    total = best = 0.0
    at, then = None, dict(held)
    for a in plan.programs[p]:
        if a.kind not in COMPUTE:
            continue
        load = loads[a.module]
        amount = load[a.microbatch] if a.span == 1 else sum(load[a.microbatch : a.microbatch + a.span])
        amount *= memory.of(a.module, a.stage)
        if a.kind is FORWARD:
            total, held[a.module] = total + amount, held[a.module] + amount
            if total > best:
                best, at, then = total, a, dict(held)
            continue
        if a.kind is not BACKWARD and not plan.modules[a.module].frozen:
            later = a.kind is BACKWARD_WEIGHT
            amount *= memory.weight_share if later else 1 - memory.weight_share
        total, held[a.module] = total - amount, held[a.module] - amount
    return Peak(best, plan.ranks_of[p], then, str(at or "nothing"))


def _loads(plan: SchedulePlan, memory: Memory) -> dict[str, list[float]]:
    """By module, the load of each micro-batch; 0 where it keeps nothing, because no backward follows."""
    every = range(plan.microbatches)
    keeps = {m: [plan.learns(m, i) for i in every] for m in plan.modules}
    return {m: [memory.load.get((m, i), 1.0) * keeps[m][i] for i in every] for m in plan.modules}
