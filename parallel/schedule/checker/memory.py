"""The most activation memory that a plan holds, by rank. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    COMPUTE,
    FORWARD,
    OVER_DATA,
    POSTED,
    Action,
    ActionKey,
    Kind,
)
from parallel.schedule.checker.graph import releases
from parallel.schedule.plan import SchedulePlan


@dataclass(frozen=True)
class Memory:
    """Sizes on one rank, in bytes or any other unit.

    activation: by module or by (module, stage), what a forward keeps for one micro-batch until its backward.
        A module in neither counts 1; the unit is then the activations of one stage.
    weight_share: the fraction of an activation that BACKWARD_WEIGHT still needs after BACKWARD_INPUT. The
        default, all of it, is an upper bound.
    load: by (module, micro-batch), a factor for ragged batches; 1 where it is not named.
    hidden: by (module, stage), the hidden states that enter a stage from the one before.
    held: by (source, stage of the sink), the rows of an edge on the ranks that make them.
    read: by (source, stage of the sink), the rows of an edge on the ranks that read them.
    whole: by (module, stage), the weights that a GATHER makes whole. They count from its start until FREE.

    What `hidden`, `held` and `read` do not name takes nothing. They count while they are not part of an
    activation: during their transfer; as gradients, from the backward that makes them to the one that uses
    them; and from the forward on where no backward follows.
    """

    activation: Mapping[str | tuple[str, int], float] = field(default_factory=dict)
    weight_share: float = 1.0
    load: Mapping[tuple[str, int], float] = field(default_factory=dict)
    hidden: Mapping[tuple[str, int], float] = field(default_factory=dict)
    held: Mapping[tuple[str, int], float] = field(default_factory=dict)
    read: Mapping[tuple[str, int], float] = field(default_factory=dict)
    whole: Mapping[tuple[str, int], float] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether transfers take memory."""
        return bool(self.hidden or self.held or self.read)

    def of(self, module: str, stage: int) -> float:
        """What one stage keeps for a micro-batch of load 1."""
        return self.activation.get((module, stage), self.activation.get(module, 1.0))


@dataclass(frozen=True)
class Peak:
    """The most that the ranks of a program hold at once.

    bytes: in the unit of Memory. ranks: those of the program. held: by module, what they hold at that moment;
    rows of an edge count under their source. action: the one that reaches the peak.
    """

    bytes: float
    ranks: tuple[int, ...]
    held: Mapping[str, float]
    action: str


def peaks(plan: SchedulePlan, memory: Memory | None = None) -> tuple[Peak, ...]:
    """By program, its high-water mark, from the order of its actions alone.

    A source holds nothing for micro-batches in which it has no items.
    """
    memory = memory or Memory()
    loads = _loads(plan, memory)
    return tuple(_peak(plan, p, memory, loads) for p in range(len(plan.programs)))


def held_microbatches(plan: SchedulePlan, module: str) -> int:
    """The most micro-batches for which any rank holds activations of a module at once. Of several virtual
    stages each holds its part."""
    only, parts = Memory({m: float(m == module) for m in plan.modules}), plan.modules[module].layout.vpp
    return max((-(-round(peak.bytes) // parts) for peak in peaks(plan, only)), default=0)


def check_limit(
    plan: SchedulePlan, limit: float, memory: Memory | None = None, *, nearest: str = ""
) -> tuple[Peak, ...]:
    """By program, its high-water mark. Raises ValueError where one is above `limit`.

    nearest: what works, for the message.
    """
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
        if a.kind is FORWARD or a.kind is Kind.GATHER or (a.kind in POSTED and moving is not None):
            amount = _activation(a, memory, loads) if a.kind is FORWARD else _gathered(a, memory)
            total, held[a.module] = total + amount, held[a.module] + amount
            if total > best:
                best, at, then = total, a, dict(held)
        elif a.kind in COMPUTE:
            amount = _activation(a, memory, loads)
            if a.kind is not BACKWARD and not plan.modules[a.module].frozen:
                later = a.kind is BACKWARD_WEIGHT
                amount *= memory.weight_share if later else 1 - memory.weight_share
            freed = [*freed, (a.module, amount)]
        elif a.kind is Kind.FREE:
            freed = [(a.module, memory.whole.get((a.module, a.stage), 0.0))]
        for module, amount in freed:
            total, held[module] = total - amount, held[module] - amount
    return Peak(best, plan.ranks_of[p], then, str(at or "nothing"))


def _activation(a: Action, memory: Memory, loads: Mapping[str, Sequence[float]]) -> float:
    load = loads[a.module]
    amount = load[a.microbatch] if a.span == 1 else sum(load[a.microbatch : a.microbatch + a.span])
    return amount * memory.of(a.module, a.stage)


def _gathered(a: Action, memory: Memory) -> float:
    """What a transfer makes whole: a stage's weights, or nothing."""
    return memory.whole.get((a.module, a.stage), 0.0) if a.kind is Kind.GATHER else 0.0


class _Moving:
    """Memory of transfers on the ranks of a program, from the action that allocates it to its last use."""

    def __init__(self, plan: SchedulePlan, p: int, memory: Memory) -> None:
        self.plan, self.p, self.memory = plan, p, memory
        self.releases = releases(plan, p)
        self.until: dict[ActionKey, list[tuple[str, float]]] = {}  # by computation, what it frees
        self.sent: dict[ActionKey, tuple[str, float]] = {}  # by the action that starts it, to be released

    def before(self, a: Action) -> list[tuple[str, float]]:
        """What an action allocates, and what is released before it (negative)."""
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
        """What the ends of a transfer here take: (amount, last computation that needs it).

        The computation is None for memory that a later computation releases.
        """
        module, i, stage = a.module, a.microbatch, a.stage
        learns, hidden = self.plan.learns(module, i), self.memory.hidden
        if a.kind is Kind.RECV_FORWARD:
            return [(hidden.get((module, stage), 0.0), (BACKWARD if learns else FORWARD, module, i, stage))]
        if a.kind is Kind.RECV_BACKWARD:
            return [(hidden.get((module, stage + 1), 0.0), (BACKWARD, module, i, stage))]
        if a.kind is Kind.SEND_FORWARD:  # with a backward, it is part of the activation
            return [] if learns else [(hidden.get((module, stage + 1), 0.0), None)]
        if a.kind is Kind.SEND_BACKWARD:
            return [(hidden.get((module, stage), 0.0), None)]
        if a.kind in OVER_DATA:
            return []
        return self._edge(a, learns)

    def _edge(self, a: Action, learns: bool) -> list[tuple[float, ActionKey | None]]:
        """_takes() for the rows of an edge."""
        source, i, stage = a.module, a.microbatch, a.stage
        makes, reads = (self.p in end for end in self.plan.ends(source, stage))
        held, read = (of.get((source, stage), 0.0) for of in (self.memory.held, self.memory.read))
        use, sink = self.plan.modules[source], self.plan.sink
        if a.kind is Kind.BOUNDARY_BACKWARD:
            back: ActionKey = (BACKWARD, source, i, use.stages - 1)
            taken: list[tuple[float, ActionKey | None]] = [(held, back)] if makes else []
            return [*taken, (read, back if makes else None)] if reads else taken
        taken = []
        if makes and (not learns or len(use.enters) > 1):  # else they are part of the activation
            taken.append((held, (FORWARD, sink, i, stage) if reads else None))
        if reads:
            taken.append((read, (BACKWARD if learns else FORWARD, sink, i, stage)))
        return taken


def _loads(plan: SchedulePlan, memory: Memory) -> dict[str, list[float]]:
    """By module, the load of each micro-batch; 0 where no backward follows, so that nothing is kept."""
    every = range(plan.microbatches)
    keeps = {m: [plan.learns(m, i) for i in every] for m in plan.modules}
    return {m: [memory.load.get((m, i), 1.0) * keeps[m][i] for i in every] for m in plan.modules}
