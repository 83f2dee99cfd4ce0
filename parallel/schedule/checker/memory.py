"""Activation memory that a plan holds at most, by rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    COMPUTE,
    FORWARD,
    POSTED,
    Action,
    ActionKey,
    Kind,
)
from parallel.schedule.checker.graph import releases
from parallel.schedule.plan import SchedulePlan


@dataclass(frozen=True)
class Memory:
    """Bytes (or any unit) on one rank.

    activation: by module, or (module, stage): what a forward keeps for one micro-batch until its backward.
        A module that is in neither counts 1, so that the unit is activations of a stage.
    weight_share: the share that BACKWARD_WEIGHT still needs after BACKWARD_INPUT; by default all of it, which
        is a bound.
    load: by (module, micro-batch), a factor, for ragged batches.
    hidden: by (module, stage), what enters a stage from the one before; held, read: by (source, stage of the
        sink), the rows of an edge where they are made and where they enter. What is in none of them takes
        nothing. They count where they are no part of an activation: while under way, with gradients from
        the backward that makes them to the one that takes them, and where nothing learns, from the forward
        on.
    """

    activation: Mapping[str | tuple[str, int], float] = field(default_factory=dict)
    weight_share: float = 1.0
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    hidden: Mapping[tuple[str, int], float] = field(default_factory=dict)
    held: Mapping[tuple[str, int], float] = field(default_factory=dict)
    read: Mapping[tuple[str, int], float] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether transfers take anything."""
        return bool(self.hidden or self.held or self.read)

    def of(self, module: str, stage: int) -> float:
        """What one stage keeps of a micro-batch of load 1."""
        return self.activation.get((module, stage), self.activation.get(module, 1.0))


@dataclass(frozen=True)
class Peak:
    """The most that ranks hold at once. ranks: those that do; held: at that moment, by module, rows under
    their source; action: what reaches it."""

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
    moving = _Moving(plan, p, memory) if memory.moves else None
    for a in plan.programs[p]:
        freed: list[tuple[str, float]] = []
        if moving is not None:
            for module, amount in moving.before(a):
                total, held[module] = total + amount, held[module] + amount
            freed = moving.after(a)
        if a.kind is FORWARD or (a.kind in POSTED and moving is not None):
            amount = _activation(a, memory, loads) if a.kind is FORWARD else 0.0
            total, held[a.module] = total + amount, held[a.module] + amount
            if total > best:
                best, at, then = total, a, dict(held)
        elif a.kind in COMPUTE:
            amount = _activation(a, memory, loads)
            if a.kind is not BACKWARD and not plan.modules[a.module].frozen:
                later = a.kind is BACKWARD_WEIGHT
                amount *= memory.weight_share if later else 1 - memory.weight_share
            freed = [*freed, (a.module, amount)]
        for module, amount in freed:
            total, held[module] = total - amount, held[module] - amount
    return Peak(best, plan.ranks_of[p], then, str(at or "nothing"))


def _activation(a: Action, memory: Memory, loads: Mapping[str, Sequence[float]]) -> float:
    load = loads[a.module]
    amount = load[a.microbatch] if a.span == 1 else sum(load[a.microbatch : a.microbatch + a.span])
    return amount * memory.of(a.module, a.stage)


class _Moving:
    """What transfers take on the ranks of a program: from the action that makes room for it to the one that
    needs it last."""

    def __init__(self, plan: SchedulePlan, p: int, memory: Memory) -> None:
        self.plan, self.p, self.memory = plan, p, memory
        self.releases = releases(plan, p)
        self.until: dict[ActionKey, list[tuple[str, float]]] = {}  # what a computation frees
        self.sent: dict[ActionKey, tuple[str, float]] = {}  # under way, by the action that starts it

    def before(self, a: Action) -> list[tuple[str, float]]:
        """What an action takes, and what is let go before it (negative)."""
        if a.kind not in POSTED:
            gone = [self.sent.pop(key) for key in self.releases.get(a[:4], ()) if key in self.sent]
            return [(module, -amount) for module, amount in gone]
        out = []
        for amount, free in self._takes(a):
            item = (a.module, amount * self.memory.load.get((a.module, a.microbatch), 1.0))
            out.append(item)
            if free is None:
                self.sent[a[:4]] = item
            else:
                self.until.setdefault(free, []).append(item)
        return out

    def after(self, a: Action) -> list[tuple[str, float]]:
        """What a computation frees at its end."""
        if a.kind in POSTED:
            return []
        kind = BACKWARD if a.kind is BACKWARD_INPUT else a.kind
        return [item for i in a.microbatches for item in self.until.pop((kind, a.module, i, a.stage), ())]

    def _takes(self, a: Action) -> list[tuple[float, ActionKey | None]]:
        """(amount, the computation that needs it last, or None: until let go) of a transfer's ends here."""
        module, i, stage = a.module, a.microbatch, a.stage
        learns, hidden = self.plan.learns(module, i), self.memory.hidden
        if a.kind is Kind.RECV_FORWARD:
            return [(hidden.get((module, stage), 0.0), (BACKWARD if learns else FORWARD, module, i, stage))]
        if a.kind is Kind.RECV_BACKWARD:
            return [(hidden.get((module, stage + 1), 0.0), (BACKWARD, module, i, stage))]
        if a.kind is Kind.SEND_FORWARD:  # what learns is an activation
            return [] if learns else [(hidden.get((module, stage + 1), 0.0), None)]
        if a.kind is Kind.SEND_BACKWARD:
            return [(hidden.get((module, stage), 0.0), None)]
        return self._edge(a, learns)

    def _edge(self, a: Action, learns: bool) -> list[tuple[float, ActionKey | None]]:
        """The same for the rows of an edge."""
        source, i, stage = a.module, a.microbatch, a.stage
        makes, reads = (self.p in end for end in self.plan.ends(source, stage))
        held, read = (of.get((source, stage), 0.0) for of in (self.memory.held, self.memory.read))
        use, sink = self.plan.modules[source], self.plan.sink
        if a.kind is Kind.BOUNDARY_BACKWARD:
            back: ActionKey = (BACKWARD, source, i, use.stages - 1)
            taken: list[tuple[float, ActionKey | None]] = [(held, back)] if makes else []
            return [*taken, (read, back if makes else None)] if reads else taken
        taken = []
        if makes and (not learns or len(use.enters) > 1):  # else they are an activation, sent as they lie
            taken.append((held, (FORWARD, sink, i, stage) if reads else None))
        if reads:
            taken.append((read, (BACKWARD if learns else FORWARD, sink, i, stage)))
        return taken


def _loads(plan: SchedulePlan, memory: Memory) -> dict[str, list[float]]:
    """By module, the load of each micro-batch; 0 where it keeps nothing, because no backward follows."""
    every = range(plan.microbatches)
    keeps = {m: [plan.learns(m, i) for i in every] for m in plan.modules}
    return {m: [memory.load.get((m, i), 1.0) * keeps[m][i] for i in every] for m in plan.modules}
