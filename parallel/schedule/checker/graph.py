"""What waits for what when a plan is carried out: the graph that the checker and the simulator share. Pure.

Programs stand for their ranks (see parallel.schedule.plan). The rules are those of the executor's handlers:
computations wait for what they need and for the other members of their groups; transfers take place beside
them, once every end has started them. What a plan computes does not depend on how long things take, so one
order in which everything can be done proves that nothing deadlocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from parallel.schedule.action import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOUNDARY,
    BOUNDARY_BACKWARD,
    BOUNDARY_FORWARD,
    COMPUTE,
    FORWARD,
    POSTED,
    RECV_BACKWARD,
    RECV_FORWARD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    Group,
    Kind,
)
from parallel.schedule.checker.release import WINDOWS, Key, Posts, settle
from parallel.schedule.plan import SchedulePlan

START = -1  # stands for the start of the step where a computation is named

# Which result of its own rank's an action needs, and what a computation leaves there.
_NEEDS = {
    BACKWARD: FORWARD,
    BACKWARD_INPUT: FORWARD,
    BACKWARD_WEIGHT: BACKWARD,
    SEND_FORWARD: FORWARD,
    SEND_BACKWARD: BACKWARD,
}
_LEAVES = {FORWARD: FORWARD, BACKWARD: BACKWARD, BACKWARD_INPUT: BACKWARD}
# What the message is called that an action starts or waits for, whether its rank sends it, and how many
# stages further its other end is.
_MESSAGE = {
    SEND_FORWARD: (SEND_FORWARD, True, 1),
    RECV_FORWARD: (SEND_FORWARD, False, -1),
    FORWARD: (SEND_FORWARD, False, -1),
    SEND_BACKWARD: (SEND_BACKWARD, True, -1),
    RECV_BACKWARD: (SEND_BACKWARD, False, 1),
    BACKWARD: (SEND_BACKWARD, False, 1),
    BACKWARD_INPUT: (SEND_BACKWARD, False, 1),
}

Result = tuple[str, int, int]  # of a forward or backward: (module, micro-batch, stage)
# Transfers take a lane: (SEND_FORWARD or SEND_BACKWARD, module, the later of its stages, from program, to
# program), or that of an edge: (kind, source, stage of the sink that its rows enter).
Lane = tuple[Any, ...]
Deed = tuple[Kind, str, int, int]  # an action without its place: (kind, module, micro-batch, stage)
Meeting = tuple[tuple[Kind, str, int, int], frozenset[int]]  # (action without its place, programs)


class Stuck(ValueError):
    """A plan that cannot run to its end. waiting: who waits for what, in words."""

    def __init__(self, waiting: Sequence[str]) -> None:
        self.waiting = waiting
        super().__init__("the schedule cannot finish: " + "; ".join(waiting[:4]))


@dataclass(frozen=True)
class Graph:
    """The computations of a plan, here whatever is not just put under way, and the transfers between them.

    Actions are numbered through all programs. first: the number of each program's first, then how many there
    are. before: by number, the last computation before it on its ranks, or START. waits: by computation, the
    transfers that it waits for, those that it lets go included. settled: of these the latter. transfers: for
    each of its ends, the computation after which it is started. lanes: by number.
    order: computations in an order in which they can be done; those that start at one moment, because their
    collectives meet, together.
    """

    first: tuple[int, ...]
    before: list[int]
    waits: dict[int, list[Key]]
    settled: dict[int, list[Key]]
    transfers: dict[Key, list[int]]
    lanes: list[Lane]
    order: list[tuple[int, ...]]


def graph_of(plan: SchedulePlan) -> Graph:
    """The graph of a plan, worked out once. Linear in its actions. Raises Stuck where it cannot finish."""
    if "graph" not in plan.memo:
        reader = _Reader(plan)
        settled, order = _settled_order(reader)
        lanes = list(reader.numbers)
        plan.memo["graph"] = Graph(
            reader.first, reader.before, reader.waits, settled, reader.transfers, lanes, order
        )
    found: Graph = plan.memo["graph"]
    return found


def _settled_order(reader: _Reader) -> tuple[dict[int, list[Key]], list[tuple[int, ...]]]:
    """What is let go where, and an order with it; the reader's waits then have it too."""
    waits = reader.waits
    for window in (*WINDOWS, None):
        read = (reader.first, reader.computations, reader.before, waits, reader.posts)
        found = settle(*read, window or 0)
        # Ranks that wait for each other's transfers in a ring need more under way; at last nobody asks.
        settled = found.known if window is None else _joined(found.known, found.asked)
        reader.waits = _joined(waits, settled)
        try:
            return settled, _Order(reader).run()
        except Stuck:
            if window is None or not found.asked:
                raise
    raise AssertionError("unreachable")


def _joined(a: Mapping[int, list[Key]], b: Mapping[int, list[Key]]) -> dict[int, list[Key]]:
    return {**a, **{n: [*a.get(n, ()), *keys] for n, keys in b.items()}}


def let_go(plan: SchedulePlan, p: int) -> dict[Deed, list[Deed]]:
    """By computation of program p, the sends and boundaries whose transfers it lets go before it computes:
    their memory is free then. Others are waited for by what reads their result, or after the last action."""
    graph, actions, found = graph_of(plan), plan.programs[p], dict[Deed, Deed]()
    for n in range(graph.first[p], graph.first[p + 1]):
        for key in graph.settled.get(n, ()):  # of several peers' the last counts
            found[_sent(graph.lanes[key[0]], key[1])] = actions[n - graph.first[p]][:4]
    out: dict[Deed, list[Deed]] = {}
    for sent, computation in found.items():
        out.setdefault(computation, []).append(sent)
    return out


def _sent(lane: Lane, microbatch: int) -> Deed:
    """The action that starts a transfer where its rows come from."""
    kind, module, stage = lane[:3]
    return kind, module, microbatch, stage - (kind is SEND_FORWARD)


class _Reader:
    """Reads every list by itself: its computations, what they wait for, and when transfers are started."""

    def __init__(self, plan: SchedulePlan) -> None:
        self.plan = plan
        self.first = (0, *accumulate(len(program) for program in plan.programs))
        self.before = [START] * self.first[-1]
        self.waits: dict[int, list[Key]] = {}
        self.transfers: dict[Key, list[int]] = defaultdict(list)
        self.numbers: dict[Lane, int] = {}
        # By (program, kind, module, stage): numbers of lanes, and of those with a source's rows and its name.
        self.known: dict[Lane, tuple[list[int], list[tuple[int, str]]]] = {}
        self.meets: dict[int, Meeting] = {}  # what several programs begin together
        self.posts = Posts()
        # Where a program stops whatever others do, and why.
        self.cut: dict[int, tuple[Action, Kind, Result]] = {}
        self.peers, self.together = _peers(plan), _Together(plan)
        self.ends = {(s, e): plan.ends(s, e) for s in plan.sources for e in plan.modules[s].enters}
        self.holds = {s: plan.hosts(s, plan.modules[s].stages - 1) for s in plan.sources}
        self.computations = [self._read(p) for p in range(len(plan.programs))]
        self.transfers.default_factory = None
        together: dict[Meeting, dict[int, int]] = defaultdict(dict)
        for p, mine in enumerate(self.computations):
            for n in mine:
                if n in self.meets:
                    together[self.meets[n]][p] = n
        self.posts.meets.update({n: together[met] for n, met in self.meets.items()})

    def _read(self, p: int) -> list[int]:
        """The computations of a program, as far as it gets if others do all that it waits for."""
        last, found = START, list[int]()
        done: dict[Kind, set[Result]] = {FORWARD: set(), BACKWARD: set()}  # on the program's own ranks
        for number, a in enumerate(self.plan.programs[p], self.first[p]):
            lacks = self._lacks(p, a, done)
            if lacks is not None:
                self.cut[p] = a, *lacks
                return found
            self.before[number] = last
            if a.kind in POSTED:
                keys = self.posts.of[number] = self._keys(p, a)
                for key in keys:
                    self.transfers[key].append(last)
                    self.posts.at[key][p] = number
                continue
            if keys := self._keys(p, a):
                self.waits[number] = keys
            if a.groups and len(members := self.together[a.groups, p]) > 1:
                self.meets[number] = (a[:4], members)
            if a.kind in _LEAVES and a.span == 1:
                done[_LEAVES[a.kind]].add(a[1:4])
            elif a.kind in _LEAVES:
                done[_LEAVES[a.kind]].update([(a.module, i, a.stage) for i in a.microbatches])
            found.append(number)
            last = number
        return found

    def _lacks(self, p: int, a: Action, done: Mapping[Kind, Set[Result]]) -> tuple[Kind, Result] | None:
        """A result on its own ranks that an action needs and that is not there."""
        need = _NEEDS.get(a.kind)
        if need is not None:
            if a.span == 1:
                return None if a[1:4] in done[need] else (need, a[1:4])
            results = [(a.module, i, a.stage) for i in a.microbatches]
        elif a.kind is BOUNDARY_FORWARD and p in self.holds[a.module]:
            need, results = FORWARD, [(a.module, a.microbatch, self.plan.modules[a.module].stages - 1)]
        elif a.kind is BOUNDARY_BACKWARD and p in self.ends[a.module, a.stage][1]:
            need, results = BACKWARD, [(self.plan.sink, a.microbatch, a.stage)]
        else:
            return None
        return next(((need, r) for r in results if r not in done[need]), None)

    def _keys(self, p: int, a: Action) -> list[Key]:
        """The transfers of which an action starts program p's end, or that a computation waits for."""
        way = (p, a.kind, a.module, a.stage)
        known = self.known.get(way)
        if known is None:
            plain, fed = [], []
            for lane in self._lanes(*way):
                number = self.numbers.setdefault(lane, len(self.numbers))
                if a.kind in COMPUTE and lane[0] in BOUNDARY:
                    fed.append((number, lane[1]))
                else:
                    plain.append(number)
            known = self.known[way] = plain, fed
        plain, fed = known
        keys = [(n, a.microbatch) for n in plain]
        if fed:  # rows come of micro-batches with items alone
            keys += [(n, i) for n, s in fed for i in a.microbatches if s in self.plan.active[i]]
        return keys

    def _lanes(self, p: int, kind: Kind, module: str, stage: int) -> list[Lane]:
        """The lanes of the transfers that actions of a kind and stage start or wait for."""
        sink = module == self.plan.sink
        if kind in BOUNDARY:
            return [(kind, module, stage)]
        use = self.plan.modules[module]
        if kind in (BACKWARD, BACKWARD_INPUT) and stage + 1 == use.stages:
            return [] if sink else [(BOUNDARY_BACKWARD, module, s) for s in use.enters]
        if kind not in _MESSAGE:
            return []
        entering = self.plan.entering(stage) if kind is FORWARD and sink else ()
        rows: list[Lane] = [(BOUNDARY_FORWARD, s, stage) for s in entering]
        if kind is FORWARD and stage == 0:
            return rows
        name, sends, step = _MESSAGE[kind]
        others = self.peers.get((module, (stage + step) % use.layout.pp, p), ())
        later = max(stage, stage + step)
        return [*((name, module, later, *((p, q) if sends else (q, p))) for q in others), *rows]


class _Order:
    """Takes every program as far as it gets, again and again, until all are at their ends."""

    def __init__(self, read: _Reader) -> None:
        self.read, self.plan, self.lanes = read, read.plan, list(read.numbers)
        self.order: list[tuple[int, ...]] = []
        self.at = [0] * len(self.plan.programs)  # computations done
        self.done = [False] * read.first[-1] + [True]  # by number; the last is START
        self.came: dict[Meeting, list[int]] = defaultdict(list)  # to what they meet for
        self.waiters: dict[int, list[int]] = defaultdict(list)  # programs that wait for a computation
        # The transfers that all their ends start.
        self.there = {key: after for key, after in read.transfers.items() if len(after) == self._ends(key)}

    def run(self) -> list[tuple[int, ...]]:
        free = list(range(len(self.plan.programs)))
        while free:
            free += self._advance(free.pop())
        stopped = [p for p, mine in enumerate(self.read.computations) if self.at[p] < len(mine)]
        waiting = [self._why(p) for p in sorted({*stopped, *self.read.cut})]
        if waiting or len(self.there) < len(self.read.transfers):
            raise Stuck(waiting or [self._say(key) for key in self.read.transfers if key not in self.there])
        return self.order

    def _advance(self, p: int) -> list[int]:
        """Take program p as far as it gets; returns the programs that may now get further."""
        mine, free = self.read.computations[p], list[int]()
        while self.at[p] < len(mine):
            number = mine[self.at[p]]
            missing = self._missing(number)
            if missing is not None:
                if missing != START:  # else it waits for good
                    self.waiters[missing].append(p)
                break
            together = [p]
            if number in self.read.meets:
                together = self.came[self.read.meets[number]]
                together.append(p)
                if len(together) < len(self.read.meets[number][1]):
                    break
                free += together[:-1]
            self.order.append(tuple([self.read.computations[q][self.at[q]] for q in together]))
            for q, n in zip(together, self.order[-1], strict=True):
                self.done[n] = True
                self.at[q] += 1
                if n in self.waiters:
                    free += self.waiters.pop(n)
        return free

    def _missing(self, number: int) -> int | None:
        """A computation that another one still waits for; START where a transfer is never under way."""
        for key in self.read.waits.get(number, ()):
            if key not in self.there:
                return START
            for n in self.there[key]:
                if not self.done[n]:
                    return n
        return None

    def _ends(self, key: Key) -> int:
        """How many programs must start a transfer."""
        lane = self.lanes[key[0]]
        return 2 if lane[0] not in BOUNDARY else len(frozenset().union(*self.read.ends[lane[1:]]))

    def _why(self, p: int) -> str:
        """Where program p has stopped and for what."""
        mine = self.read.computations[p]
        if self.at[p] == len(mine):
            a, kind, (module, i, stage) = self.read.cut[p]
            why = f"{kind.value}({module}.{stage}, {i}) on the rank itself"
        else:
            number = mine[self.at[p]]
            a = self.plan.programs[p][number - self.read.first[p]]
            keys = self.read.waits.get(number, ())
            missing = [
                key for key in keys if key not in self.there or not all(self.done[n] for n in self.there[key])
            ]
            if missing:
                why = self._say(missing[0])
            else:
                came = self._ranks(self.came[self.read.meets[number]])
                why = f"the other members of its groups (only {came} came)"
        return f"{self._ranks([p])}: {a} waits for {why}"

    def _say(self, key: Key) -> str:
        """A transfer in words."""
        (kind, module, later, *link), i = self.lanes[key[0]], key[1]
        if kind in BOUNDARY:
            return f"{Action(kind, module, i, later)} to be started by every rank of the edge"
        source = link[0]
        carries = "activations" if kind is SEND_FORWARD else "gradients"
        where = f"between {module}.{later - 1} and {module}.{later} from {self._ranks([source])}"
        return f"{carries} of micro-batch {i} {where}"

    def _ranks(self, programs: Iterable[int]) -> str:
        return ", ".join(f"rank {self.plan.ranks_of[q][0]}" for q in programs)


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


class _Together(dict[tuple[tuple[Group, ...], int], frozenset[int]]):
    """By (groups of an action, program): the programs that carry it out together, made when asked for."""

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
