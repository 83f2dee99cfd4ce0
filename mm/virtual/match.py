"""Traces of ranks, matched: does each collective meet the same call on all members, each send its receive?

The ranks' programs are run against each other under the rules of NCCL. A communicator is one queue on each of
its members, in the order of the calls there. A collective starts when it is the first of every member's
queue, a message when it is the first of both ends'; messages of one batch start together. Tags mean nothing,
and a send is done when it is received. A rank goes on until it waits for a call that is not done. On gloo
sends are buffered and messages are found by their tags, in any order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mm.virtual.records import Call, Trace

SHOWN = 5  # problems and ranks that a message names


class Channel(NamedTuple):
    """A communicator: what plans call it, and its global ranks in order."""

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """One rank's calls and waits.

    steps: in order, (True, k) starts posts[k], (False, k) waits for it. posts: calls that are handed over at
    once: a collective, a message, or a batch of messages. traced: the communicators of the rank that was
    traced, by their own names; channels: those of this rank, which takes the same place in each.
    """

    rank: int
    steps: Sequence[tuple[bool, int]]
    posts: Sequence[tuple[Call, ...]]
    traced: Mapping[str, Channel]
    channels: Mapping[str, Channel]

    def peer(self, call: Call) -> int | None:
        """The other end of a message, a global rank."""
        if call.peer is None:
            return None
        at = self.traced[call.communicator].ranks.index(call.peer)
        return self.channels[call.communicator].ranks[at]


@dataclass(eq=False)
class Posted:
    """posts[number] of a rank, under way. calls: those that have not met theirs, each with its peer."""

    rank: int
    number: int
    channel: Channel
    calls: list[tuple[Call, int | None]]

    @property
    def collective(self) -> bool:
        """Whether all members of the communicator take part."""
        return self.calls[0][1] is None


@dataclass
class Result:
    """What was found. problems: in words; none where all calls meet. calls: how many were made."""

    problems: list[str] = field(default_factory=list)
    calls: int = 0
    communicators: int = 0

    @property
    def ok(self) -> bool:
        """Whether all calls meet, and no rank waits for ever."""
        return not self.problems


def program_of(trace: Trace) -> Program:
    """The program of a rank that was traced."""
    number: list[int] = []
    posts: list[list[Call]] = []
    steps: list[tuple[int, bool, int]] = []
    batch: int | None = None
    for call in trace.calls:
        if call.batch is None or call.batch != batch:
            posts.append([])
            steps.append((call.at, True, len(posts) - 1))
        posts[-1].append(call)
        batch = call.batch
        number.append(len(posts) - 1)
    steps += [(at, False, number[k]) for at, k in trace.waits]
    named = {c.communicator: c.group for c in trace.calls}
    channels = {own: Channel(name, trace.groups[own]) for own, name in named.items()}
    order = [(post, k) for _, post, k in sorted(steps)]
    return Program(trace.rank, order, [tuple(p) for p in posts], channels, channels)


def match(traces: Iterable[Trace], *, buffered: bool = False) -> Result:
    """Run the traces of all ranks of a job against each other.

    buffered: by the rules of host backends: a send is done at once, messages are found by their tags.
    """
    return match_programs([program_of(t) for t in traces], buffered=buffered)


def match_programs(programs: Sequence[Program], *, buffered: bool = False) -> Result:
    """match() of programs. Their communicators must hold only ranks that have one."""
    run = _Run(programs, buffered)
    run.go()
    return run.result()


class _Run:
    """All programs side by side, each as far as it has come."""

    def __init__(self, programs: Sequence[Program], buffered: bool) -> None:
        self.buffered = buffered
        self.programs = {p.rank: p for p in programs}
        self.at = dict.fromkeys(self.programs, 0)
        self.done = {p.rank: bytearray(len(p.posts)) for p in programs}
        self.queues: dict[tuple[Channel, int], deque[Posted]] = defaultdict(deque)
        self.arrived: dict[Channel, int] = defaultdict(int)  # members whose first call is a collective
        self.sent: dict[_Ends, deque[Call]] = defaultdict(deque)
        self.awaited: dict[_Ends, deque[tuple[Posted, Call]]] = defaultdict(deque)
        self.ready = deque(self.programs)
        self.firsts: deque[Posted] = deque()  # that have become the first of their queues
        self.problems: list[str] = []
        self.calls = 0

    def go(self) -> None:
        """Let every rank go on as far as it can."""
        while (self.ready or self.firsts) and len(self.problems) < SHOWN:
            if self.firsts:
                self._first(self.firsts.popleft())
            else:
                self._advance(self.ready.popleft())

    def result(self) -> Result:
        """What was found."""
        problems = self.problems[:SHOWN] or self._stuck()
        return Result(problems, self.calls, len({c for c, _ in self.queues}))

    def _advance(self, rank: int) -> None:
        program, done = self.programs[rank], self.done[rank]
        while self.at[rank] < len(program.steps):
            post, number = program.steps[self.at[rank]]
            if not post and not done[number]:
                return
            self.at[rank] += 1
            if post:
                self._post(self._posted(program, number))

    def _posted(self, program: Program, number: int) -> Posted:
        calls = program.posts[number]
        channel = program.channels[calls[0].communicator]
        return Posted(program.rank, number, channel, [(c, program.peer(c)) for c in calls])

    def _post(self, posted: Posted) -> None:
        self.calls += len(posted.calls)
        queue = self.queues[posted.channel, posted.rank]
        if self.buffered and not posted.collective:
            self._post_tagged(posted)
            return
        queue.append(posted)
        if len(queue) == 1:
            self.firsts.append(posted)

    def _post_tagged(self, posted: Posted) -> None:
        """Messages on gloo: a send is done at once, a receive when the message of its tag has been sent."""
        for call, peer in list(posted.calls):
            assert peer is not None
            ends = (posted.rank, peer) if call.op == "send" else (peer, posted.rank)
            key = _Ends(posted.channel, *ends, call.tag)
            if call.op == "send":
                self._finish(posted, call)
                self.sent[key].append(call)
            else:
                self.awaited[key].append((posted, call))
            while self.sent[key] and self.awaited[key]:
                receiver, theirs = self.awaited[key].popleft()
                self._compare(self.sent[key].popleft(), theirs, key)
                self._finish(receiver, theirs)

    def _first(self, posted: Posted) -> None:
        """A call has become the first of its queue, unless its peer has met it since."""
        if not posted.calls:
            return
        if posted.collective:
            self.arrived[posted.channel] += 1
            if self.arrived[posted.channel] == len(posted.channel.ranks):
                self.arrived[posted.channel] = 0
                self._meet([self.queues[posted.channel, r][0] for r in posted.channel.ranks])
            return
        for call, peer in list(posted.calls):
            assert peer is not None
            queue = self.queues[posted.channel, peer]
            other = queue[0] if queue and not queue[0].collective else None
            wanted = "recv" if call.op == "send" else "send"
            if other is None or not other.calls:
                continue
            met = next((c for c, p in other.calls if p == posted.rank and c.op == wanted), None)
            if met is None:
                continue
            ends = (posted.rank, peer) if call.op == "send" else (peer, posted.rank)
            both = (call, met) if call.op == "send" else (met, call)
            self._compare(*both, _Ends(posted.channel, *ends, call.tag))
            self._finish(posted, call)
            self._finish(other, met)

    def _meet(self, members: list[Posted]) -> None:
        """All members of a communicator have come to a collective."""
        _check_collective([x.calls[0][0] for x in members], members[0].channel, self.problems)
        for posted in members:
            self._finish(posted, posted.calls[0][0])

    def _finish(self, posted: Posted, call: Call) -> None:
        posted.calls = [x for x in posted.calls if x[0] is not call]
        if posted.calls:
            return
        self.done[posted.rank][posted.number] = True
        self.ready.append(posted.rank)
        queue = self.queues[posted.channel, posted.rank]
        if queue and queue[0] is posted:
            queue.popleft()
            if queue:
                self.firsts.append(queue[0])

    def _compare(self, send: Call, receive: Call, ends: _Ends) -> None:
        if (send.bytes, send.dtype) != (receive.bytes, receive.dtype):
            self.problems.append(
                f"{ends.channel.name}: rank {ends.source} sends {send.bytes} bytes of {send.dtype} in "
                f"{send.during}, but rank {ends.dest} receives {receive.bytes} of {receive.dtype} in "
                f"{receive.during}"
            )

    def _stuck(self) -> list[str]:
        """Why ranks have not come to their ends; calls that nobody meets."""
        waiting = [r for r, p in self.programs.items() if self.at[r] < len(p.steps)]
        if waiting:
            shown = "; ".join(self._why(r) for r in waiting[:SHOWN])
            return [f"{len(waiting)} of {len(self.programs)} ranks wait for ever: {shown}"]
        left = [q[0] for q in self.queues.values() if q]
        lost = [k for found in (self.sent, self.awaited) for k, q in found.items() if q]
        return [f"rank {x.rank}: {_described(x)} meets nothing" for x in left[:SHOWN]] + [
            f"{k.channel.name}: a message of rank {k.source} to rank {k.dest} is left over"
            for k in lost[:SHOWN]
        ]

    def _why(self, rank: int) -> str:
        program = self.programs[rank]
        posted = self._posted(program, program.steps[self.at[rank]][1])
        queue = self.queues[posted.channel, rank]
        behind = f" behind {_described(queue[0])}" if queue and queue[0].number != posted.number else ""
        return f"rank {rank} for {_described(posted)}{behind}"


class _Ends(NamedTuple):
    channel: Channel
    source: int
    dest: int
    tag: int


def _described(posted: Posted) -> str:
    call, peer = posted.calls[0]
    ends = "" if peer is None else f" {'to' if call.op == 'send' else 'from'} rank {peer}"
    return f"{call.op} of {posted.channel.name}{ends} in {call.during}"


def _check_collective(calls: Sequence[Call], channel: Channel, problems: list[str]) -> None:
    """Compare one collective on all members; appends what differs."""
    first = calls[0]
    for rank, call in zip(channel.ranks, calls, strict=True):
        alike = (call.op, call.dtype, bool(call.sends)) == (first.op, first.dtype, bool(first.sends))
        if alike and (first.sends or call.bytes == first.bytes):
            continue
        ours, theirs = (f"{c.op} of {c.bytes} bytes of {c.dtype} in {c.during}" for c in (first, call))
        problems.append(f"{channel.name}: {ours} on rank {channel.ranks[0]}, but {theirs} on rank {rank}")
        return
    if first.sends:
        _check_splits(calls, channel, problems)


def _check_splits(calls: Sequence[Call], channel: Channel, problems: list[str]) -> None:
    for i, source in enumerate(calls):
        for j, dest in enumerate(calls):
            if source.sends[j] != dest.receives[i]:
                problems.append(
                    f"{channel.name}: rank {channel.ranks[i]} sends {source.sends[j]} bytes to rank "
                    f"{channel.ranks[j]} in {source.during}, which expects {dest.receives[i]}"
                )
                return
