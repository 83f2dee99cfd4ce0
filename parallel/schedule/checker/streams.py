"""Whether a plan deadlocks on a backend that works as NCCL does. Pure.

Such a backend has a stream for each communicator, in which operations run one after the other in the order of
their calls. A transfer starts once it is the first of its stream at every end, and is done at all of them
together: there is no buffer, so a send waits for its receive. Tags do not exist. The host does not wait, but
for the first use of a communicator, for which all who use it have to come.

Two rules are tried (NCCL user guide, "Using multiple NCCL communicators concurrently"):

- "one": each rank has one stream for all of its communicators, and its collectives are in it too. A plan that
  keeps to this rule has one order of all operations, and so is safe on any number of communicators, shared
  ones included, and on hardware that starts kernels in the order of their calls.
- "each": each communicator has a stream of its own. A plan that breaks this rule is sure to hang.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Literal, NamedTuple

from parallel.schedule.action import OVER_DATA, Action
from parallel.schedule.checker.graph import graph_of
from parallel.schedule.checker.reader import Collective, TransferKey, reading_of
from parallel.schedule.plan import SchedulePlan
from parallel.topology.groups import Group

Streams = Literal["one", "each"]
FirstUse = Literal["connected", "eager", "lazy"]


class Ring(NamedTuple):
    """Operations that wait for each other. steps: each with its rank and what it waits for, as text."""

    steps: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.steps)


def find_ring(plan: SchedulePlan, streams: Streams, first_use: FirstUse = "connected") -> Ring | None:
    """Operations that wait for each other in a ring; None where the plan reaches its end. Linear in its
    actions.

    first_use: "connected": every communicator was used before the step. "eager": communicators exist, but the
        first message of a direction between two ranks connects them, for which the host waits. "lazy": the
        first operation makes the communicator, for which the host waits: for a message with the rank at the
        other end, on an edge with all of its ranks.

    Raises Stuck where the plan has no order on any backend (graph_of).
    """
    return _Run(plan, streams, first_use).run()


class _At(NamedTuple):
    """A place where a program can be blocked: its list, or one of its streams."""

    program: int
    stream: str | None = None


class _FirstUse(NamedTuple):
    """A first use of a group for which the host waits: by these programs, in one direction where `way` is
    given."""

    group: Group
    programs: frozenset[int]
    way: tuple[int, int] | None = None


class _Run:
    """Takes every program as far as it gets, again and again, until all are at their ends or none moves."""

    def __init__(self, plan: SchedulePlan, streams: Streams, first_use: FirstUse) -> None:
        self.plan, self.one, self.first_use = plan, streams == "one", first_use
        self.reading, self.waits = reading_of(plan), graph_of(plan).waits
        self.program_of = [p for p, program in enumerate(plan.programs) for _ in program]
        self.at = list(self.reading.first[:-1])  # by program, the action that comes next
        self.queues: dict[_At, deque[int]] = defaultdict(deque)  # the posted actions of each stream
        # By posted action, the queue of its stream.
        self.queue = {n: self.queues[self._stream(n)] for n in self.reading.starts}
        self.lacks: dict[int, int] = {}  # by posted action, how many of its transfers are not done
        self.heads: dict[TransferKey, list[int]] = defaultdict(list)  # its ends that lead their streams
        self.done: set[TransferKey] = set()
        self.arrived: dict[Collective, list[int]] = defaultdict(list)
        self.met: dict[_FirstUse, set[int]] = defaultdict(set)  # who has come to a first use
        self.free = deque(range(len(plan.programs)))

    def run(self) -> Ring | None:
        while self.free:
            self._advance(self.free.popleft())
        stuck = [p for p, n in enumerate(self.at) if n < self.reading.first[p + 1]]
        return self._ring(_At(stuck[0])) if stuck else None

    def _advance(self, p: int) -> None:
        """Take program p as far as it gets."""
        end, starts, connected = self.reading.first[p + 1], self.reading.starts, self.first_use == "connected"
        while self.at[p] < end:
            n = self.at[p]
            keys = starts.get(n)
            if keys is None:
                if not self._compute(p, n):
                    return
                continue
            if not connected and not self._come(p, n):
                return
            self.at[p] = n + 1
            queue = self.queue[n]
            self.lacks[n] = len(keys)
            queue.append(n)
            if len(queue) == 1:
                self._lead(n)

    def _compute(self, p: int, n: int) -> bool:
        """Whether program p gets past computation n."""
        if self._waited(p, n) is not None:
            return False
        collective = self.reading.collectives.get(n)
        if collective is None:
            self._pass(p)
            return True
        came = self.arrived[collective]
        if p not in came:
            came.append(p)
        if len(came) < len(collective.programs):
            return False
        for q in came:
            self._pass(q)
        self.free.extend(q for q in came if q != p)
        return True

    def _pass(self, p: int) -> None:
        """Program p has done its computation. Sums in it are among its collectives, which have all met."""
        if self.at[p] in self.reading.closes:
            self.done.add(self.reading.closes[self.at[p]])
        self.at[p] += 1

    def _waited(self, p: int, n: int) -> _At | None:
        """The stream in which something lies that computation n of program p waits for."""
        for key in self.waits.get(n, ()):
            if key not in self.done:
                return self._stream(self.reading.started_by[key][p])
        if self.one and n in self.reading.collectives and self.queues[_At(p, "")]:
            return _At(p, "")  # its collectives come after what is in the stream
        return None

    def _lead(self, n: int) -> None:
        """Action n is the first of its stream now."""
        leads = [n]
        while leads:
            n = leads.pop()
            for key in self.reading.starts[n]:
                ends = self.heads[key]
                ends.append(n)
                if len(ends) == len(self.reading.started_by[key]):
                    self.done.add(key)
                    leads += [first for end in ends for first in self._finish(end)]

    def _finish(self, n: int) -> list[int]:
        """One transfer of action n is done; returns the action that is the first of its stream then, if it is
        another one."""
        p = self.program_of[n]
        self.free.append(p)
        self.lacks[n] -= 1
        if self.lacks[n]:
            return []
        queue = self.queue[n]
        queue.popleft()
        return [queue[0]] if queue else []

    def _come(self, p: int, n: int) -> bool:
        """Whether all who have to come to the first use of what action n uses are there."""
        there = True
        for use in self._first_uses(n):
            came = self.met[use]
            if p not in came:
                came.add(p)
                self.free.extend(came - {p})
            there = there and came == use.programs
        return there

    def _first_uses(self, n: int) -> list[_FirstUse]:
        """The first uses that action n may be part of."""
        group, found = self._action(n).groups[0], []
        for key in self.reading.starts[n]:
            flow = self.reading.flows[key[0]]
            if flow.kind in OVER_DATA and self.first_use == "eager":
                continue  # its communicator exists and has no directions
            order = flow.ends or tuple(sorted(self.reading.started_by[key]))
            way = None  # lazy: one communicator for both directions
            if self.first_use == "eager" and flow.ends is not None:
                way = (flow.ends[0], flow.ends[1])
            found.append(_FirstUse(group, frozenset(order), way))
        return found

    # what went wrong

    def _ring(self, at: _At) -> Ring:
        """The ring that ends the chain of what is waited for from here."""
        seen: dict[_At, str] = {}
        while at not in seen:
            seen[at], at = self._why(at)
        return Ring(tuple(seen.values())[list(seen).index(at) :])

    def _why(self, at: _At) -> tuple[str, _At]:
        """Why something does not go on, as text, and what it waits for."""
        p = at.program
        if at.stream is not None:
            return self._why_stream(at)
        n = self.at[p]
        what = f"{self._rank(p)}: {self._action(n)}"
        if n in self.reading.starts:
            use = next(u for u in self._first_uses(n) if self.met[u] != u.programs)
            q = min(use.programs - self.met[use])
            return f"{what}, the first use of {use.group}, waits for {self._rank(q)}", _At(q)
        stream = self._waited(p, n)
        if stream is not None:
            return f"{what} waits for {self._action(self.queues[stream][0])} before it", stream
        collective = self.reading.collectives[n]
        q = min(collective.programs - set(self.arrived[collective]))
        return f"{what} waits for {self._rank(q)} in its groups", _At(q)

    def _why_stream(self, at: _At) -> tuple[str, _At]:
        first = self.queues[at][0]
        key = next(k for k in self.reading.starts[first] if k not in self.done)
        ends = self.reading.started_by[key]
        q = next(q for q, n in ends.items() if n not in self.heads[key])
        there = ends[q]
        what = f"{self._rank(at.program)}: {self._action(first)} waits for {self._rank(q)}"
        if there >= self.at[q]:
            return what, _At(q)
        behind = self._stream(there)
        return f"{what}, where it comes after {self._action(self.queues[behind][0])}", behind

    def _stream(self, n: int) -> _At:
        """The stream of a posted action."""
        return _At(self.program_of[n], "" if self.one else self._action(n).groups[0].lane)

    def _action(self, n: int) -> Action:
        p = self.program_of[n]
        return self.plan.programs[p][n - self.reading.first[p]]

    def _rank(self, p: int) -> str:
        return f"rank {self.plan.ranks_of[p][0]}"
