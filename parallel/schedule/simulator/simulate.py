"""Simulates a plan: when each action starts and ends under a cost model, without a process group."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from parallel.schedule.action import BOUNDARY_BACKWARD, OVER_DATA, POSTED, Action, Kind
from parallel.schedule.checker.graph import Graph, graph_of
from parallel.schedule.checker.reader import START, Flow, TransferKey
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.traffic import with_traffic


class Transfer(NamedTuple):
    """Rows on their way from program `source` to program `target`, or what a program gathers or sums.

    kind: SEND_FORWARD, SEND_BACKWARD or a boundary's; for GATHER and GRAD_SYNC source and target are one.
    module: for a boundary its source.
    start: when the last end has started it. end: when the rows are there. In seconds.
    """

    kind: Kind
    module: str
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When the actions of a plan happen, in seconds from the start of the step.

    begins, ends: by number in the plan's graph, of computations. Actions that only start a transfer take no
        time.
    """

    plan: SchedulePlan
    costs: Costs
    begins: Sequence[float]
    ends: Sequence[float]

    @cached_property
    def start(self) -> tuple[list[float], ...]:
        """By program and index of action."""
        return self._by_program(self.begins)

    @cached_property
    def end(self) -> tuple[list[float], ...]:
        """By program and index of action."""
        return self._by_program(self.ends)

    def _by_program(self, of: Sequence[float]) -> tuple[list[float], ...]:
        graph = graph_of(self.plan)
        return tuple(
            [
                self._end(graph.before[n]) if a.kind in POSTED else of[n]
                for n, a in enumerate(program, graph.first[p])
            ]
            for p, program in enumerate(self.plan.programs)
        )

    def _end(self, computation: int) -> float:
        return 0.0 if computation == START else self.ends[computation]

    @cached_property
    def seconds(self) -> float:
        """The step time: until all is computed and summed."""
        graph = graph_of(self.plan)
        delays = _delays(graph, self.costs)
        summed = [(n, 0) for n, flow in enumerate(graph.flows) if flow.kind is Kind.GRAD_SYNC]
        sums = [max(map(self._end, graph.transfers[key])) + delays[key[0]] for key in summed]
        return max((*self.ends, *sums), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """By program, the seconds that it computes."""
        first = graph_of(self.plan).first
        spans = [b - a for a, b in zip(self.begins, self.ends, strict=True)]
        for n in graph_of(self.plan).second.values():
            spans[n] = 0.0  # the forward of the pair counts
        return tuple(sum(spans[first[p] : first[p + 1]]) for p in range(len(self.plan.programs)))

    def bubble(self, rank: int) -> float:
        """The fraction of the step for which a rank is idle."""
        return 1 - self.busy[self.plan.program_of[rank]] / self.seconds if self.seconds else 0.0

    @property
    def mean_bubble(self) -> float:
        """The mean of bubble() over all ranks."""
        whole = self.seconds * len(self.plan.ranks)
        used = sum(b * len(r) for b, r in zip(self.busy, self.plan.ranks_of, strict=True))
        return 1 - used / whole if whole else 0.0

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers between programs, ordered by when they start."""
        out = []
        graph = graph_of(self.plan)
        delays = _delays(graph, self.costs)
        pairs = [self._pairs(flow) for flow in graph.flows]
        for (n, _), after in graph.transfers.items():
            start, flow = max(map(self._end, after)), graph.flows[n]
            out += [Transfer(flow.kind, flow.module, a, b, start, start + delays[n]) for a, b in pairs[n]]
        return tuple(sorted(out, key=lambda t: t.start))

    def _pairs(self, flow: Flow) -> Sequence[tuple[int, int]]:
        """The programs that the transfers of a flow go from and to; of what travels over data ranks, each of
        its programs alone."""
        if flow.kind in OVER_DATA:
            return [(p, p) for p in flow.ends or ()]
        if flow.ends is not None:
            return [(flow.ends[0], flow.ends[1])]
        sources, targets = self.plan.ends(flow.module, flow.stage)
        if flow.kind is BOUNDARY_BACKWARD:
            sources, targets = targets, sources
        return [(s, t) for s in sources for t in targets if s != t]

    @cached_property
    def critical_path(self) -> tuple[tuple[int, Action], ...]:
        """(rank, action) of the computations whose costs and delays add up to the step time, in order."""
        graph = graph_of(self.plan)
        delays = _delays(graph, self.costs)
        met = {n: members for members in graph.order for n in members}
        where = {n: (p, n - a) for p, a in enumerate(graph.first[:-1]) for n in range(a, graph.first[p + 1])}
        out = []
        at = max(met, key=lambda n: self.ends[n], default=START)
        while at != START:
            p, k = where[at]
            out.append((self.plan.ranks_of[p][0], self.plan.programs[p][k]))
            came = [(self._end(graph.before[n]), graph.before[n]) for n in met[at]]
            for key in (key for n in met[at] for key in graph.waits.get(n, ())):
                came += [(self._end(n) + delays[key[0]], n) for n in graph.transfers[key]]
            at = max(came)[1]
        return tuple(reversed(out))


def simulate(plan: SchedulePlan, costs: Costs | None = None) -> Timeline:
    """The timeline of `plan`, in time linear in the actions of its programs.

    Raises Stuck if the plan cannot finish.
    """
    costs = costs or Costs()
    return Timeline(plan, costs, *run_graph(graph_of(plan), plan, costs))


def run_graph(graph: Graph, plan: SchedulePlan, costs: Costs) -> tuple[list[float], list[float]]:
    """When each computation begins and ends, in seconds, by number in a graph of `plan`."""
    actions = [a for _, a in plan]
    seconds: list[float] = []
    for program in plan.programs:
        alone = [0.0 if a.kind in POSTED else costs.seconds(a) for a in program]
        seconds += with_traffic(alone, plan, program, costs)
    for pair in graph.second.items():
        forward, backward = (actions[n] for n in pair)
        traffic = sum(seconds[n] for n in pair) - costs.seconds(forward) - costs.seconds(backward)
        seconds[pair[0]] = seconds[pair[1]] = costs.pair_seconds(forward, backward) + traffic
    if costs.cores is None:
        return _own_cores(graph, seconds, costs)
    used = [len(plan.ranks_of[p]) * costs.share.get(a.module, 1.0) for p, a in plan]
    return _SharedCores(graph, seconds, costs, used).run()


def _delays(graph: Graph, costs: Costs) -> list[float]:
    """By flow, the seconds that a transfer takes once all its ends have started it; of sums in a backward,
    those that they outlast it."""
    return [
        costs.transfer.get((f.module, f.kind), 0.0) if f.within is None else costs.beyond(f.within, f.kind)
        for f in graph.flows
    ]


def _own_cores(graph: Graph, seconds: Sequence[float], costs: Costs) -> tuple[list[float], list[float]]:
    """(begins, ends) where every rank has a core: every action starts once its inputs are there."""
    begins, ends = [0.0] * len(seconds), [0.0] * (len(seconds) + 1)  # the last is of START
    transfers, waits, before, delays = graph.transfers, graph.waits, graph.before, _delays(graph, costs)
    for members in graph.order:
        start = 0.0
        for n in members:
            start = max(start, ends[before[n]])
            for key in waits.get(n, ()):
                for k in transfers[key]:
                    start = max(start, ends[k] + delays[key[0]])
        for n in members:
            begins[n] = start
            ends[n] = start + seconds[n]
    ends.pop()
    return begins, ends


class _SharedCores:
    """Event by event, where the speed of a rank depends on how many others compute at that moment.

    used: by computation, the cores that all of its ranks would use.
    """

    def __init__(self, graph: Graph, seconds: Sequence[float], costs: Costs, used: Sequence[float]) -> None:
        assert costs.cores is not None
        self.graph, self.seconds, self.delays, self.cores = graph, seconds, _delays(graph, costs), costs.cores
        self.used = list(used)
        for n in graph.second.values():
            self.used[n] = 0.0  # a pair needs one core
        self.begins, self.ends = [0.0] * len(seconds), [0.0] * len(seconds)
        # What waits for each computation and each transfer. Entries of graph.order are given by index.
        self.starts: dict[int, list[TransferKey]] = defaultdict(list)  # transfers that wait for a computation
        self.follows: dict[int, list[int]] = defaultdict(list)  # entries that wait for a computation
        self.arrives: dict[TransferKey, list[int]] = defaultdict(list)  # entries that wait for a transfer
        for at, members in enumerate(graph.order):
            for n in members:
                self.follows[graph.before[n]].append(at)
                for key in graph.waits.get(n, ()):
                    self.arrives[key].append(at)
        for key, after in graph.transfers.items():
            for n in after:
                self.starts[n].append(key)
        # How many computations and transfers each entry and each transfer still waits for.
        self.lacks = [sum(1 + len(graph.waits.get(n, ())) for n in members) for members in graph.order]
        self.unsent = {key: len(after) for key, after in graph.transfers.items()}
        self.now = 0.0  # seconds
        self.clock = 0.0  # seconds of work that a computation has done if it has run since the start
        self.running = 0.0  # cores that those who compute would use
        self.computing: list[tuple[float, int]] = []  # (clock at its end, computation)
        self.arriving: list[tuple[float, TransferKey]] = []  # (second, transfer)

    def run(self) -> tuple[list[float], list[float]]:
        self._ended(START)
        while self.computing or self.arriving:
            rate = self.cores / self.running if self.running > self.cores else 1.0
            finish = self.now + (self.computing[0][0] - self.clock) / rate if self.computing else None
            if self.arriving and (finish is None or self.arriving[0][0] <= finish):
                second, key = heapq.heappop(self.arriving)
                self.clock += (second - self.now) * rate
                self.now = second
                self._advance(self.arrives[key])
                continue
            assert finish is not None
            self.clock, n = heapq.heappop(self.computing)
            self.now = self.ends[n] = finish
            self.running -= self.used[n]
            self._ended(n)
        return self.begins, self.ends

    def _ended(self, computation: int) -> None:
        for key in self.starts[computation]:
            self.unsent[key] -= 1
            if not self.unsent[key]:
                heapq.heappush(self.arriving, (self.now + self.delays[key[0]], key))
        self._advance(self.follows[computation])

    def _advance(self, entries: Sequence[int]) -> None:
        """Count one thing less for which these entries wait; start those that wait for nothing more."""
        for at in entries:
            self.lacks[at] -= 1
            if self.lacks[at]:
                continue
            for n in self.graph.order[at]:
                self.begins[n] = self.now
                self.running += self.used[n]
                heapq.heappush(self.computing, (self.clock + self.seconds[n], n))
