"""Runs a plan without a process group: when each action starts and ends under a cost model.

Programs stand for their ranks (see parallel.schedule.plan). The rules are those of the executor's handlers:
computations wait for what they need and for the other members of their groups; transfers take place beside
them, once every end has started them. What a plan computes does not depend on the costs, so a plan that runs
to its end here does so always, and one that stops here is deadlocked.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from parallel.schedule.action import BOUNDARY, COMPUTE, POSTED, RECEIVES, SENDS, Action, Kind
from parallel.schedule.costs import Costs
from parallel.schedule.plan import SchedulePlan

At = tuple[int, int]  # (program, index of an action in it)
# A result: (what, module, stage or link, micro-batch, program that makes it, program that gets it).
Key = tuple[str, str, int, int, int, int]

_RESULT = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.BACKWARD_INPUT: "backward"}
_CHANNEL = {
    Kind.SEND_FORWARD: "activations",
    Kind.RECV_FORWARD: "activations",
    Kind.SEND_BACKWARD: "gradients",
    Kind.RECV_BACKWARD: "gradients",
}
_SENDING = {Kind.RECV_FORWARD: Kind.SEND_FORWARD, Kind.RECV_BACKWARD: Kind.SEND_BACKWARD}


class Stuck(ValueError):
    """A plan that cannot run to its end. waiting: per program, where it stopped and for what."""

    def __init__(self, plan: SchedulePlan, waiting: dict[int, tuple[Action, str]]) -> None:
        self.waiting = waiting
        lines = [f"rank {plan.ranks_of[p][0]}: {a} waits for {why}" for p, (a, why) in waiting.items()]
        super().__init__("the schedule cannot finish: " + "; ".join(lines[:4]))


class Transfer(NamedTuple):
    """Rows on their way: started by all ends at `start`, there at `end`. source, target: programs."""

    action: Action
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When things happen, in seconds. start, end: by program and index of action."""

    plan: SchedulePlan
    start: tuple[list[float], ...]
    end: tuple[list[float], ...]
    transfers: tuple[Transfer, ...]
    cause: tuple[dict[int, At | None], ...]

    @cached_property
    def seconds(self) -> float:
        """The step time."""
        return max((max(end) for end in self.end if end), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each program computes."""
        return tuple(
            sum(b - a for a, b in zip(s, e, strict=True)) for s, e in zip(self.start, self.end, strict=True)
        )

    def bubble(self, rank: int) -> float:
        """The share of the step that a rank is idle."""
        return 1 - self.busy[self.plan.program_of[rank]] / self.seconds if self.seconds else 0.0

    @property
    def mean_bubble(self) -> float:
        """The idle share of all ranks together."""
        whole = self.seconds * len(self.plan.ranks)
        used = sum(b * len(r) for b, r in zip(self.busy, self.plan.ranks_of, strict=True))
        return 1 - used / whole if whole else 0.0

    @cached_property
    def critical_path(self) -> tuple[tuple[int, Action], ...]:
        """(rank, action) of the chain of computations that the step time follows, first to last."""
        ends = [(e[-1], p, len(e) - 1) for p, e in enumerate(self.end) if e]
        at: At | None = max(ends)[1:] if ends else None  # type: ignore[assignment]
        while at is not None and at[1] not in self.cause[at[0]]:  # the last actions may only start transfers
            at = (at[0], at[1] - 1) if at[1] else None
        out = []
        while at is not None:
            out.append((self.plan.ranks_of[at[0]][0], self.plan.programs[at[0]][at[1]]))
            at = self.cause[at[0]].get(at[1])
        return tuple(reversed(out))


def simulate(plan: SchedulePlan, costs: Costs | None = None) -> Timeline:
    """Time `plan`. Linear in the actions of its programs. Raises Stuck where it cannot finish."""
    return _Run(plan, costs or Costs()).run()


class _Run:
    def __init__(self, plan: SchedulePlan, costs: Costs) -> None:
        self.plan, self.costs = plan, costs
        n = len(plan.programs)
        self.start = tuple([0.0] * len(a) for a in plan.programs)
        self.end = tuple([0.0] * len(a) for a in plan.programs)
        self.cause: tuple[dict[int, At | None], ...] = tuple({} for _ in range(n))
        self.transfers: list[Transfer] = []
        self.at = [0] * n
        self.done: list[int | None] = [None] * n  # the last computation of each program
        self.there: set[Key] = set()
        self.posted: dict[Key, list[int]] = defaultdict(list)  # ends of a transfer that have started it
        self.waiters: dict[Key, list[int]] = defaultdict(list)
        self.blocked: dict[int, Key] = {}
        self.now = self.clock = 0.0  # seconds, and how far a computation running all the time has come
        self.computing: list[tuple[float, int]] = []  # (clock at its end, program)
        self.arriving: list[tuple[float, int, Key]] = []  # (second, who started it last, what)
        self.running = 0  # ranks that compute
        self.many = [len(r) for r in plan.ranks_of]
        self.together = _Together(plan)
        self.peers = _Peers(plan)
        self.ends = {s: plan.ends(s) for s in plan.sources}
        self.stages = {m: u.stages for m, u in plan.modules.items()}
        self.pp = {m: u.layout.pp for m, u in plan.modules.items()}

    def run(self) -> Timeline:
        for p in range(len(self.plan.programs)):
            self._advance(p, None)
        while self.computing or self.arriving:
            self._next_event()
        if any(at < len(a) for at, a in zip(self.at, self.plan.programs, strict=True)):
            programs = self.plan.programs
            raise Stuck(
                self.plan, {p: (programs[p][self.at[p]], self._say(key)) for p, key in self.blocked.items()}
            )
        return Timeline(self.plan, self.start, self.end, tuple(self.transfers), self.cause)

    def _next_event(self) -> None:
        cores = self.costs.cores
        rate = 1.0 if cores is None or self.running <= cores else cores / self.running
        finish = self.now + (self.computing[0][0] - self.clock) / rate if self.computing else None
        if self.arriving and (finish is None or self.arriving[0][0] <= finish):
            second, by, key = heapq.heappop(self.arriving)
            self.clock += (second - self.now) * rate
            self.now = second
            self._arrived(key, by)
            return
        assert finish is not None
        self.clock, p = heapq.heappop(self.computing)
        self.now = self.clock if cores is None else finish
        at, action = self.at[p], self.plan.programs[p][self.at[p]]
        self.end[p][at] = self.now
        self.running -= self.many[p]
        self.done[p] = at
        self.at[p] += 1
        if action.kind in COMPUTE:
            for i in range(action.microbatch, action.microbatch + action.span):
                self.there.add(_own(action.kind, action.module, action.stage, i, p))
        self._advance(p, (p, at))

    def _advance(self, p: int, why: At | None) -> None:
        """Take program p as far as it gets; `why` is the computation whose end lets it go on."""
        program = self.plan.programs[p]
        while self.at[p] < len(program):
            action = program[self.at[p]]
            missing = next((key for key in self._needs(p, action) if key not in self.there), None)
            if missing is not None:
                self.waiters[missing].append(p)
                self.blocked[p] = missing
                return
            if action.kind in POSTED:
                self.start[p][self.at[p]] = self.end[p][self.at[p]] = self.now
                self.at[p] += 1
                self._post(p, action)
                continue
            if len(self.together[action.groups, p]) > 1 and not self._all_came(p, action):
                return
            for q in self.together[action.groups, p]:
                self._begin(q, why)
            return
        self.blocked.pop(p, None)

    def _all_came(self, p: int, action: Action) -> bool:
        """Whether p is the last member of the action's groups to come to it."""
        key = ("group", f"{action.kind.value} {action.module}", action.stage, action.microbatch, 0, 0)
        came, members = self.posted[key], self.together[action.groups, p]
        came.append(p)
        self.blocked[p] = key
        if not members <= set(came):
            return False
        came[:] = [q for q in came if q not in members]
        return True

    def _begin(self, p: int, why: At | None) -> None:
        at = self.at[p]
        self.blocked.pop(p, None)
        self.start[p][at] = self.now
        self.cause[p][at] = why
        self.running += self.many[p]
        heapq.heappush(self.computing, (self.clock + self.costs.seconds(self.plan.programs[p][at]), p))

    def _post(self, p: int, action: Action) -> None:
        """Start p's end of a transfer; it is under way once the last end has started it."""
        if action.kind in BOUNDARY:
            key = (action.kind.value, action.module, 0, action.microbatch, 0, 0)
            sources, targets = self.ends[action.module]
            self.posted[key].append(p)
            if len(self.posted[key]) == len(sources | targets):
                if action.kind is Kind.BOUNDARY_BACKWARD:
                    sources, targets = targets, sources
                self._depart(action, key, p, sources, targets)
            return
        for key in self._link(p, action):
            self.posted[key].append(p)
            if len(self.posted[key]) == 2:
                self._depart(action, key, p, {key[4]}, {key[5]})

    def _link(self, p: int, a: Action) -> list[Key]:
        """The transfers of a send or receive of program p."""
        assert a.peer is not None
        link, what = max(a.stage, a.peer), _CHANNEL[a.kind]
        others = self.peers[a.module, a.peer % self.pp[a.module], p]
        if a.kind in SENDS:
            return [(what, a.module, link, a.microbatch, p, q) for q in others]
        return [(what, a.module, link, a.microbatch, q, p) for q in others]

    def _depart(self, action: Action, key: Key, by: int, sources: Set[int], targets: Set[int]) -> None:
        del self.posted[key]
        sending = _SENDING.get(action.kind, action.kind)
        seconds = self.costs.transfer.get((action.module, sending), 0.0)
        for source in sources:
            for target in targets:
                if source != target:
                    self.transfers.append(Transfer(action, source, target, self.now, self.now + seconds))
        if seconds:
            heapq.heappush(self.arriving, (self.now + seconds, by, key))
        else:
            self._arrived(key, by)

    def _arrived(self, key: Key, by: int) -> None:
        self.there.add(key)
        last = self.done[by]
        for p in self.waiters.pop(key, ()):
            self._advance(p, None if last is None else (by, last))

    def _needs(self, p: int, a: Action) -> list[Key]:
        """The results that an action of program p waits for."""
        kind, module, stage, i = a.kind, a.module, a.stage, a.microbatch
        if kind in RECEIVES:
            return []
        if kind is Kind.FORWARD:
            if stage:
                return self._from(Kind.RECV_FORWARD, a, stage - 1, p)
            if module != self.plan.sink:
                return []
            sources = [s for s in self.plan.sources if s in self.plan.active[i]]
            return [(Kind.BOUNDARY_FORWARD.value, s, 0, i, 0, 0) for s in sources]
        if kind is Kind.BOUNDARY_FORWARD:
            if p not in self.ends[module][0]:
                return []
            return [_own(Kind.FORWARD, module, self.stages[module] - 1, i, p)]
        if kind is Kind.BOUNDARY_BACKWARD:
            return [_own(Kind.BACKWARD, self.plan.sink, 0, i, p)] if p in self.ends[module][1] else []
        covered = range(i, i + a.span)
        if kind is Kind.SEND_FORWARD:
            return [_own(Kind.FORWARD, module, stage, i, p)]
        if kind in (Kind.SEND_BACKWARD, Kind.BACKWARD_WEIGHT):
            return [_own(Kind.BACKWARD, module, stage, k, p) for k in covered]
        if kind not in COMPUTE:
            return []
        out = [_own(Kind.FORWARD, module, stage, k, p) for k in covered]
        if stage + 1 < self.stages[module]:
            out += self._from(Kind.RECV_BACKWARD, a, stage + 1, p)
        elif module != self.plan.sink:
            back = [k for k in covered if module in self.plan.active[k]]
            out += [(Kind.BOUNDARY_BACKWARD.value, module, 0, k, 0, 0) for k in back]
        return out

    def _from(self, receive: Kind, a: Action, peer: int, p: int) -> list[Key]:
        others = self.peers[a.module, peer % self.pp[a.module], p]
        link = max(a.stage, peer)
        return [(_CHANNEL[receive], a.module, link, a.microbatch, q, p) for q in others]

    def _say(self, key: Key) -> str:
        what, module, at, i, source, _ = key
        if what == "group":
            have = ", ".join(f"rank {self.plan.ranks_of[q][0]}" for q in self.posted[key])
            return f"the other members of its groups (only {have} came)"
        if what in _CHANNEL.values():
            ranks = self.plan.ranks_of[source]
            return (
                f"{what} of micro-batch {i} between {module}.{at - 1} and {module}.{at} from rank {ranks[0]}"
            )
        if what.startswith("boundary"):
            return f"{what}({module}, {i}) to be started by every rank of the edge"
        return f"{what}({module}.{at}, {i}) on the rank itself"


def _own(kind: Kind, module: str, stage: int, microbatch: int, p: int) -> Key:
    """What a computation of program p leaves on its ranks."""
    return (_RESULT.get(kind, kind.value), module, stage, microbatch, p, p)


class _Peers(dict[tuple[str, int, int], tuple[int, ...]]):
    """By (module, pipeline rank, program): the programs there that share a pipeline with the program."""

    def __init__(self, plan: SchedulePlan) -> None:
        super().__init__()
        found: dict[tuple[str, int, int], set[int]] = defaultdict(set)
        for module, use in plan.modules.items():
            if use.layout.pp == 1:
                continue
            chains = {tuple(plan.program_of[r] for r in ranks) for ranks in use.layout.groups("pp")}
            for chain in chains:
                for pp, q in enumerate(chain):
                    for p in (chain[pp - 1], chain[(pp + 1) % len(chain)]):
                        found[module, pp, p].add(q)
        self.update({key: tuple(sorted(q)) for key, q in found.items()})


class _Together(dict[tuple[tuple[str, ...], int], frozenset[int]]):
    """By (groups of an action, program): the programs that carry it out together, made when asked for."""

    def __init__(self, plan: SchedulePlan) -> None:
        super().__init__()
        self.plan = plan

    def __missing__(self, key: tuple[tuple[str, ...], int]) -> frozenset[int]:
        groups, p = key
        sets = [s for g in groups for s in self.plan.program_sets(g)]
        joined = {p}
        while more := set().union(*(s for s in sets if s & joined)) - joined:
            joined |= more
        self[key] = frozenset(joined)
        return self[key]
