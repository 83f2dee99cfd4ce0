"""Reads each list of a plan by itself: its computations, what they wait for, where transfers start. Pure.

A program stands for all of its ranks (see parallel.schedule.plan). The rules are those of the executor's
handlers. A computation waits for its inputs and for the other members of its groups. A transfer runs
concurrently with computations, once every end has started it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOUNDARY,
    BOUNDARY_BACKWARD,
    BOUNDARY_FORWARD,
    COMPUTE,
    FORWARD,
    OVER_DATA,
    POSTED,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    ActionKey,
    Kind,
)
from parallel.schedule.plan import SchedulePlan, gather_groups, parameter_groups
from parallel.topology.groups import Group

START = -1  # the start of the step, where the number of a computation is expected

# A transfer: (number of its flow, micro-batch). A plain tuple, because a plan has up to a million of them.
TransferKey = tuple[int, int]


class _Message(NamedTuple):
    """The message that an action starts or waits for.

    kind: SEND_FORWARD or SEND_BACKWARD. sends: whether the action's rank sends it. step: how many stages
    further its other end is.
    """

    kind: Kind
    sends: bool
    step: int


_MESSAGE = {
    SEND_FORWARD: _Message(SEND_FORWARD, True, 1),
    RECV_FORWARD: _Message(SEND_FORWARD, False, -1),
    FORWARD: _Message(SEND_FORWARD, False, -1),
    SEND_BACKWARD: _Message(SEND_BACKWARD, True, -1),
    RECV_BACKWARD: _Message(SEND_BACKWARD, False, 1),
    BACKWARD: _Message(SEND_BACKWARD, False, 1),
    BACKWARD_INPUT: _Message(SEND_BACKWARD, False, 1),
}
# The kind of result, computed on its own rank, that an action needs, and the kind that a computation leaves.
_NEEDS = {
    BACKWARD: FORWARD,
    BACKWARD_INPUT: FORWARD,
    BACKWARD_WEIGHT: BACKWARD,
    SEND_FORWARD: FORWARD,
    SEND_BACKWARD: BACKWARD,
}
_LEAVES = {FORWARD: FORWARD, BACKWARD: BACKWARD, BACKWARD_INPUT: BACKWARD}
Result = tuple[str, int, int]  # of a forward or backward: (module, micro-batch, stage), action[1:4]


class Flow(NamedTuple):
    """The messages of one kind between its ends. Each micro-batch of a flow is one transfer.

    kind: SEND_FORWARD or SEND_BACKWARD along a pipeline; BOUNDARY_FORWARD or BOUNDARY_BACKWARD on an edge;
        GATHER or GRAD_SYNC over data ranks, one transfer a step, whose micro-batch is 0.
    module: the module of the pipeline or the parameters; the source of the edge.
    stage: the later of the two stages; the sink's stage that the edge's rows enter; that of the parameters.
    ends: (sending program, receiving program), or the programs of the data ranks; None on an edge, where
        SchedulePlan.ends() gives them.
    within: for sums of gradients in the last backward, that action. They are started by its end.
    """

    kind: Kind
    module: str
    stage: int
    ends: tuple[int, ...] | None = None
    within: Action | None = None


class _FlowNumbers(NamedTuple):
    """Flows by number. every: with a transfer for every micro-batch of an action. rows: (flow, source) of
    edges, with a transfer where the source has items alone."""

    every: list[int]
    rows: list[tuple[int, str]]


class Collective(NamedTuple):
    """A computation that several programs begin together, because they share a group."""

    action: ActionKey
    programs: frozenset[int]


class Stop(NamedTuple):
    """Where a program stops whatever the others do: `action` needs a result that its rank never computes."""

    action: Action
    kind: Kind
    result: Result


@dataclass
class Reading:
    """What was read from the lists of a plan, with actions numbered through all programs.

    A computation is, here, every action that does not only start a transfer. The two of a pair begin as one:
    the forward waits for what both wait for, and the backward is in `second` alone.

    first: the number of each program's first action, then how many actions there are.
    before: by action, the last computation before it in its program, or START.
    computations: by program, the numbers of its computations, in order.
    second: by forward of a pair, its backward. forward: the same the other way round.
    waits: by computation, the transfers that it waits for.
    transfers: by transfer, for each of its ends the last computation before that end is started.
    starts: by action, the transfers whose end it starts.
    started_by: by transfer, {program: number of the action that starts its end there}.
    closes: by last backward, the sums that it has started by its end.
    collectives: by computation, what it begins together with other programs.
    together: by computation, {program: number of the computation that begins with it}, itself included.
    flows: by number.
    stopped: by program, where it stops whatever the others do; it has no computations from there on.
    """

    first: tuple[int, ...]
    before: list[int]
    computations: list[list[int]] = field(default_factory=list)
    second: dict[int, int] = field(default_factory=dict)
    forward: dict[int, int] = field(default_factory=dict)
    waits: dict[int, list[TransferKey]] = field(default_factory=dict)
    transfers: defaultdict[TransferKey, list[int]] = field(default_factory=lambda: defaultdict(list))
    starts: dict[int, list[TransferKey]] = field(default_factory=dict)
    started_by: dict[TransferKey, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    closes: dict[int, TransferKey] = field(default_factory=dict)
    collectives: dict[int, Collective] = field(default_factory=dict)
    together: dict[int, Mapping[int, int]] = field(default_factory=dict)
    flows: list[Flow] = field(default_factory=list)
    stopped: dict[int, Stop] = field(default_factory=dict)

    def begins(self, n: int) -> int:
        """The number of the computation with which n begins: itself, or the forward of its pair."""
        return self.forward.get(n, n)


def reading_of(plan: SchedulePlan) -> Reading:
    """What is read from all lists of a plan, worked out once. Linear in their actions."""
    if "reading" not in plan.memo:
        plan.memo["reading"] = _Reader(plan).run()
    found: Reading = plan.memo["reading"]
    return found


class _Reader:
    def __init__(self, plan: SchedulePlan) -> None:
        self.plan = plan
        first = (0, *accumulate(len(program) for program in plan.programs))
        self.reading = Reading(first, [START] * first[-1])
        self.numbers: dict[Flow, int] = {}
        # By (program, kind, module, stage) of actions.
        self.known: dict[tuple[int, Kind, str, int], _FlowNumbers] = {}
        self.peers, self.members = _peers(plan), _Members(plan)
        self.readers = {(s, e): plan.ends(s, e)[1] for s in plan.sources for e in plan.modules[s].enters}
        self.holders = {s: plan.hosts(s, plan.modules[s].stages - 1) for s in plan.sources}

    def run(self) -> Reading:
        found = self.reading
        found.computations = [self._read(p) for p in range(len(self.plan.programs))]
        found.flows = list(self.numbers)
        found.transfers.default_factory = None  # all are there: from here on another key is an error
        together: dict[Collective, dict[int, int]] = defaultdict(dict)
        for p, mine in enumerate(found.computations):
            for n in mine:
                if n in found.collectives:
                    together[found.collectives[n]][p] = n
        found.together.update({n: together[c] for n, c in found.collectives.items()})
        return found

    def _read(self, p: int) -> list[int]:
        """The computations of a program, as far as it gets if others do all that it waits for."""
        last, forward, computations, found = START, START, list[int](), self.reading
        gathers: dict[tuple[str, int], list[TransferKey]] = {}  # by stage, until a computation waits for it
        sums: list[TransferKey] = []
        late = {a[1:4] for a in self.plan.programs[p] if a.kind is Kind.GRAD_SYNC}
        done: dict[Kind, set[Result]] = {FORWARD: set(), BACKWARD: set()}  # on the program's own ranks
        for number, a in enumerate(self.plan.programs[p], found.first[p]):
            lacks = self._lacks(p, a, done)
            if lacks is not None:
                found.stopped[p] = Stop(a, *lacks)
                return computations
            found.before[number] = last
            if a.kind in POSTED:
                keys = found.starts[number] = self._transfers(p, a)
                for key in keys:
                    found.transfers[key].append(last)
                    found.started_by[key][p] = number
                if a.kind is Kind.GATHER:
                    gathers[a.module, a.stage] = keys
                elif a.kind is Kind.GRAD_SYNC:
                    sums += keys
                continue
            if a.paired:
                forward = number  # of a pair: both begin with the backward, which comes next
                continue
            begun, first = [a], number
            if forward != START:
                begun, first = [self.plan.programs[p][forward - found.first[p]], a], forward
                found.second[forward], found.forward[number], forward = number, forward, START
            more = sums if a.kind is Kind.OPTIMIZER else []
            if gathers and a.kind in COMPUTE:
                more = [key for b in begun for key in gathers.pop((b.module, b.stage), ())]
            self._begin(p, first, begun, more)
            for b in begun:
                if b.kind in _LEAVES and b.span == 1:
                    done[_LEAVES[b.kind]].add(b[1:4])
                elif b.kind in _LEAVES:
                    done[_LEAVES[b.kind]].update([(b.module, i, b.stage) for i in b.microbatches])
            closed = self._closed(p, a, late) if a.last else None
            if closed is not None:
                found.closes[number] = closed
                found.transfers[closed].append(number)
                found.started_by[closed][p] = number
                sums.append(closed)
            computations.append(first)
            last = number
        return computations

    def _begin(self, p: int, number: int, begun: Sequence[Action], more: Sequence[TransferKey]) -> None:
        """What a computation, or the two of a pair, wait for before they begin. more: gathers and sums."""
        if keys := [*(key for a in begun for key in self._transfers(p, a)), *more]:
            self.reading.waits[number] = keys
        groups = begun[0].groups if len(begun) == 1 else tuple(g for a in begun for g in a.groups)
        if groups and len(members := self.members[groups, p]) > 1:
            self.reading.collectives[number] = Collective(begun[0][:4], members)

    def _closed(self, p: int, a: Action, late: Set[Result]) -> TransferKey | None:
        """The sums in a last backward; None where it has none. late: what GRAD_SYNC sums."""
        use = self.plan.modules[a.module]
        groups = parameter_groups(a.module, use)
        if not groups or not use.sums_in(a.kind, a.last) or (a.module, 0, a.stage) in late:
            return None
        flow = Flow(Kind.GRAD_SYNC, a.module, a.stage, tuple(sorted(self.members[groups, p])), a)
        return self.numbers.setdefault(flow, len(self.numbers)), 0

    def _lacks(self, p: int, a: Action, done: Mapping[Kind, Set[Result]]) -> tuple[Kind, Result] | None:
        """A result on its own ranks that an action needs and that is not there."""
        need = _NEEDS.get(a.kind)
        if need is not None:
            if a.span == 1:
                return None if a[1:4] in done[need] else (need, a[1:4])
            results = [(a.module, i, a.stage) for i in a.microbatches]
        elif a.kind is BOUNDARY_FORWARD and p in self.holders[a.module]:
            need, results = FORWARD, [(a.module, a.microbatch, self.plan.modules[a.module].stages - 1)]
        elif a.kind is BOUNDARY_BACKWARD and p in self.readers[a.module, a.stage]:
            need, results = BACKWARD, [(self.plan.sink, a.microbatch, a.stage)]
        else:
            return None
        return next(((need, r) for r in results if r not in done[need]), None)

    def _transfers(self, p: int, a: Action) -> list[TransferKey]:
        """The transfers whose end in program p an action starts, or that a computation waits for."""
        use = (p, a.kind, a.module, a.stage)
        known = self.known.get(use)
        if known is None:
            known = self.known[use] = self._flow_numbers(*use)
        every, rows = known
        keys = [(flow, a.microbatch) for flow in every]
        if rows:
            keys += [(flow, i) for flow, s in rows for i in a.microbatches if s in self.plan.active[i]]
        return keys

    def _flow_numbers(self, p: int, kind: Kind, module: str, stage: int) -> _FlowNumbers:
        """The flows of actions of a kind and stage, numbered as they are met."""
        found = _FlowNumbers([], [])
        for flow in self._flows(p, kind, module, stage):
            number = self.numbers.setdefault(flow, len(self.numbers))
            if kind in COMPUTE and flow.ends is None:
                found.rows.append((number, flow.module))
            else:
                found.every.append(number)
        return found

    def _flows(self, p: int, kind: Kind, module: str, stage: int) -> list[Flow]:
        """The flows of the transfers that actions of a kind and stage start or wait for."""
        sink = module == self.plan.sink
        if kind in BOUNDARY:
            return [Flow(kind, module, stage)]
        use = self.plan.modules[module]
        if kind in OVER_DATA:
            groups = (gather_groups if kind is Kind.GATHER else parameter_groups)(module, use)
            return [Flow(kind, module, stage, tuple(sorted(self.members[groups, p])))]
        if kind in (BACKWARD, BACKWARD_INPUT) and stage + 1 == use.stages:
            return [] if sink else [Flow(BOUNDARY_BACKWARD, module, s) for s in use.enters]
        if kind not in _MESSAGE:
            return []
        entering = self.plan.entering(stage) if kind is FORWARD and sink else ()
        rows = [Flow(BOUNDARY_FORWARD, s, stage) for s in entering]
        if kind is FORWARD and stage == 0:
            return rows
        message = _MESSAGE[kind]
        others = self.peers.get((module, (stage + message.step) % use.layout.pp, p), ())
        later = max(stage, stage + message.step)
        ends = [(p, q) if message.sends else (q, p) for q in others]
        return [*(Flow(message.kind, module, later, pair) for pair in ends), *rows]


def _peers(plan: SchedulePlan) -> dict[tuple[str, int, int], tuple[int, ...]]:
    """By (module, pipeline rank, program): the programs there that share a pipeline with the program."""
    found: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    for module, use in plan.modules.items():
        if use.layout.pp == 1:
            continue
        chains = {tuple(plan.program_of[r] for r in ranks) for ranks in use.layout.groups("pp")}
        for chain in chains:
            for pp, q in enumerate(chain):
                for p in (chain[pp - 1], chain[(pp + 1) % len(chain)]):
                    found[module, pp, p].add(q)
    return {key: tuple(sorted(q)) for key, q in found.items()}


class _Members(dict[tuple[tuple[Group, ...], int], frozenset[int]]):
    """By (groups of an action, program): the programs that carry it out together; worked out on first use."""

    def __init__(self, plan: SchedulePlan) -> None:
        super().__init__()
        self.plan = plan

    def __missing__(self, key: tuple[tuple[Group, ...], int]) -> frozenset[int]:
        groups, p = key
        sets = [s for g in groups for s in self.plan.program_sets(g)]
        joined = {p}
        while more := set().union(*(s for s in sets if s & joined)) - joined:
            joined |= more
        self[key] = frozenset(joined)
        return self[key]
