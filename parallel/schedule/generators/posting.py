"""Transfers in one order: where in each list they are started. Pure.

A transfer is started at one moment of the simulated step on all of its ranks: when its rows are ready where
they come from. In each list it then stands before the computation that runs at that moment, and so beside it.
Moments follow one another in the same order on every rank. All operations of the step therefore have one
order, whatever the communicators they run on, and each could wait for the other end without a deadlock: no
backend needs buffers, tags or a stream for each direction (checker/streams.py proves it of every plan).

A stage's gradients are summed once they are complete on all of its data ranks. Its weights are gathered a
number of computations before the first of these ranks needs them, or at the start of the step.

lower() leaves receives and gathers at the head of each list; they would be started far too early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from parallel.schedule.action import BOUNDARY, BOUNDARY_FORWARD, COMPUTE, SENDS, Action, Kind
from parallel.schedule.checker.graph import Graph
from parallel.schedule.checker.order import find_order
from parallel.schedule.checker.reader import START, Flow, reading_of
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.simulate import run_graph

# A moment of the simulated step: (second, turn). Things that follow one another may have equal seconds; their
# places in an order of all computations then decide. A plain tuple, because a plan has many.
_Moment = tuple[float, int]
# What has one moment: (number of a set of flows that share ends, micro-batch).
_Message = tuple[int, int]


def in_one_order(plan: SchedulePlan, costs: Costs | None, lead: int | None = 1) -> SchedulePlan:
    """The plan with every transfer at its moment. Linear in its actions but for a sort of each list.

    lead: how many computations at least run between the start of a gather and the first that needs it; None
        starts all gathers with the step.
    Raises Stuck where the plan has no order.
    """
    reading = reading_of(plan)
    joined = _joined_flows(reading.flows)
    ends = _ends(plan, joined, costs)
    ready = {**_gathers(plan, joined, ends, lead), **_ready(plan, joined, ends)}
    # Equal moments are told apart by a number that is the same on all ranks.
    numbered = {message: (*moment, k) for k, (message, moment) in enumerate(ready.items())}
    programs = []
    for program, low in zip(plan.programs, reading.first[:-1], strict=True):
        keys = []
        for n in range(low, low + len(program)):
            started = reading.starts.get(n)
            if started is None:
                keys.append((*ends[n], -1, n))
            else:
                flow, microbatch = started[0]
                keys.append((*numbered[joined[flow], microbatch], n))
        keys.sort()
        programs.append(tuple([program[key[3] - low] for key in keys]))
    return replace(plan, programs=tuple(programs))


def _joined_flows(flows: Sequence[Flow]) -> list[int]:
    """By flow, the number of its set. A rank starts the messages of all its peers at once, so flows that
    share an end have their moments in common."""
    at: dict[tuple[Kind, str, int, str, int], int] = {}  # by end of a flow, a flow that has it
    parent = list(range(len(flows)))

    def root(n: int) -> int:
        while parent[n] != n:
            n = parent[n]
        return n

    for n, flow in enumerate(flows):
        for way, program in zip(("from", "to"), flow.ends or (), strict=False):
            other = at.setdefault((flow.kind, flow.module, flow.stage, way, program), n)
            parent[root(n)] = root(other)
    return [root(n) for n in range(len(flows))]


def _ends(plan: SchedulePlan, joined: Sequence[int], costs: Costs | None) -> Mapping[int, _Moment]:
    """By computation, when it ends."""
    reading = reading_of(plan)
    sets: dict[int, list[int]] = defaultdict(list)
    for flow, number in enumerate(joined):
        sets[number].append(flow)
    waits = reading.waits
    if len(sets) < len(joined):
        waits = {n: [(f, i) for flow, i in keys for f in sets[joined[flow]]] for n, keys in waits.items()}
    graph = Graph(
        first=reading.first,
        before=reading.before,
        waits=waits,
        released={},
        transfers=reading.transfers,
        flows=reading.flows,
        second=reading.second,
        order=find_order(plan, reading, waits),
    )
    _, ends = run_graph(graph, plan, costs or Costs())
    return {n: (ends[n], turn) for turn, entry in enumerate(graph.order) for n in entry}


def _gathers(
    plan: SchedulePlan, joined: Sequence[int], ends: Mapping[int, _Moment], lead: int | None
) -> dict[_Message, _Moment]:
    """By gather, when it is started on all of its ranks."""
    found: dict[_Message, _Moment] = {}
    reading = reading_of(plan)
    for program, low in zip(plan.programs, reading.first[:-1], strict=True):
        waiting: dict[tuple[str, int], _Message] = {}
        computed: list[int] = []  # the computations so far
        for n, a in enumerate(program, low):
            if a.kind is Kind.GATHER:
                flow, microbatch = reading.starts[n][0]
                waiting[a.module, a.stage] = (joined[flow], microbatch)
            elif a.kind in COMPUTE:
                computed.append(n)
                message = waiting.pop((a.module, a.stage), None)
                if message is not None:
                    since = computed[0 if lead is None else max(0, len(computed) - 1 - lead)]
                    moment = _moment(ends, reading.before[since])
                    found[message] = min(found.get(message, moment), moment)
    return found


def _moment(ends: Mapping[int, _Moment], computation: int) -> _Moment:
    return (0.0, -1) if computation == START else ends[computation]


def _ready(plan: SchedulePlan, joined: Sequence[int], ends: Mapping[int, _Moment]) -> dict[_Message, _Moment]:
    """By message, when its rows are there on all ranks that send them."""
    found: dict[_Message, _Moment] = {}
    reading = reading_of(plan)
    for p, (program, low) in enumerate(zip(plan.programs, reading.first[:-1], strict=True)):
        final: dict[tuple[str, int], int] = {}  # by stage, its last backward
        for n, a in enumerate(program, low):
            if a.last:
                final[a.module, a.stage] = n
            if a.kind in SENDS or a.kind is Kind.GRAD_SYNC or (a.kind in BOUNDARY and _sends(plan, p, a)):
                flow, microbatch = reading.starts[n][0]
                before = reading.before[n] if a.kind is not Kind.GRAD_SYNC else final[a.module, a.stage]
                message, moment = (joined[flow], microbatch), ends[before]
                if message not in found or moment > found[message]:
                    found[message] = moment
    return found


def _sends(plan: SchedulePlan, p: int, a: Action) -> bool:
    """Whether the rows of a boundary come from program p."""
    sources, targets = plan.ends(a.module, a.stage)
    return p in (sources if a.kind is BOUNDARY_FORWARD else targets)
