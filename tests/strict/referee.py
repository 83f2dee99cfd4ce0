"""NCCL's rules as a state machine: ranks post calls, and it says which may start. Pure.

- Each communicator has one queue a rank. The call at its head starts when its other ends are at their heads.
- A message starts when its send and its receive are both at the head: nothing is buffered, tags do not exist.
  The k-th send from a to b meets the k-th receive. Messages of one batch progress independently between
  peers, and the batch leaves the queue when all of them have started.
- A collective starts when it is at the head on all members, with the same operation and sizes.
- First uses block the calling host (calls.meetings), before the call enters its queue.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.strict.calls import Call, Comm, Key, Op, direction, meetings, needed_at


class Reply(NamedTuple):
    """A message to a rank. kind: its call `number` is "passed" (the host goes on) or "done"; or "start", its
    operation `op` with `tag`."""

    rank: int
    kind: str
    number: int
    op: int = 0
    tag: int = 0


class Broken(RuntimeError):
    """A rule that was broken: operations meet that do not fit."""


@dataclass
class _Entry:
    """A call of a rank. stages: meetings ahead of it. open: its operations that have not started."""

    rank: int
    call: Call
    stages: list[set[Key]]
    open: list[int] = field(default_factory=list)

    def open_ops(self) -> list[tuple[int, Op]]:
        """Operations that have not started, in order, each with its index in the call."""
        return [(k, self.call.ops[k]) for k in self.open]


class Referee:
    """The state of all communicators of `world` ranks. eager: whether groups make their communicator at once,
    which then carries unbatched messages too."""

    def __init__(self, world: int, eager: bool) -> None:
        self.world, self.eager = world, eager
        self.queues: dict[tuple[Comm, int], deque[_Entry]] = defaultdict(deque)
        self.came: dict[Key, set[int]] = defaultdict(set)
        self.gated: dict[Comm, list[_Entry]] = defaultdict(list)
        self.entries: dict[tuple[int, int], _Entry] = {}  # not done, by (rank, call number)
        self.waiting: dict[int, set[int]] = {r: set() for r in range(world)}  # calls that hosts wait for
        self.left: set[int] = set()
        self.tags = 0

    def post(self, rank: int, call: Call) -> list[Reply]:
        """A rank issues a call. Raises Broken where operations do not fit each other."""
        stages = [
            {key for key in keys if needed_at(key) - self.came[key]}
            for keys in meetings(rank, call, self.eager)
        ]
        entry = _Entry(rank, call, stages, list(range(len(call.ops))))
        self.entries[rank, call.number] = entry
        self.gated[call.comm].append(entry)
        return [*self._meet(call.comm), *self._progress(call.comm)]

    def wait(self, rank: int, number: int) -> None:
        """The host of a rank waits for a call."""
        self.waiting[rank].add(number)

    def go_on(self, rank: int, number: int) -> None:
        """It does so no longer."""
        self.waiting[rank].discard(number)

    def leave(self, rank: int) -> None:
        """A rank has come to its end."""
        self.left.add(rank)

    # first uses

    def _meet(self, comm: Comm) -> Iterator[Reply]:
        moved = True
        while moved:
            moved = False
            for entry in list(self.gated[comm]):
                while entry.stages and self._met(entry):
                    entry.stages.pop(0)
                    moved = True
                if not entry.stages:
                    self.gated[comm].remove(entry)
                    self.queues[comm, entry.rank].append(entry)
                    yield Reply(entry.rank, "passed", entry.call.number)

    def _met(self, entry: _Entry) -> bool:
        for key in entry.stages[0]:
            self.came[key].add(entry.rank)
        self._check_shared(entry)
        return not any(self._missing(entry))

    def _missing(self, entry: _Entry) -> list[tuple[Key, frozenset[int]]]:
        """The meetings that an entry waits at, each with the ranks that have not come."""
        keys = entry.stages[0] if entry.stages else ()
        return [(key, late) for key in keys if (late := needed_at(key) - self.came[key])]

    def _check_shared(self, entry: _Entry) -> None:
        """Two ranks connect both directions with one message, so their first calls must mirror each other."""
        comm = entry.call.comm
        if len(comm.ranks) != 2 or len(entry.stages) != 1:
            return
        for other in self.gated[comm]:
            if other.rank == entry.rank or len(other.stages) != 1:
                continue
            ours, theirs = entry.stages[0], other.stages[0]
            if ours & theirs and ours != theirs:
                raise Broken(
                    f"{entry.call.label}: two ranks connect with one message, but rank {entry.rank} does "
                    f"{entry.call} where rank {other.rank} does {other.call}"
                )

    # queues

    def _head(self, comm: Comm, rank: int) -> _Entry | None:
        queue = self.queues[comm, rank]
        return queue[0] if queue else None

    def _progress(self, comm: Comm) -> Iterator[Reply]:
        moved = True
        while moved:
            moved = False
            for rank in comm.ranks:
                head = self._head(comm, rank)
                if head is None:
                    continue
                found = list(self._messages(head) if head.call.ops[0].message else self._collective(head))
                moved = moved or bool(found)
                yield from found

    def _messages(self, entry: _Entry) -> Iterator[Reply]:
        comm, rank = entry.call.comm, entry.rank
        for k, op in entry.open_ops():
            peer = self._head(comm, op.peer) if k in entry.open else None  # a rank's own messages meet here
            for j, other in peer.open_ops() if peer is not None else ():
                if other.message and other.kind != op.kind and other.peer == rank:
                    assert peer is not None
                    _check_message(entry, op, peer, other)
                    self.tags += 1
                    yield from self._start(entry, k)
                    yield from self._start(peer, j)
                    break

    def _collective(self, entry: _Entry) -> Iterator[Reply]:
        comm = entry.call.comm
        heads = [head for r in comm.ranks if (head := self._head(comm, r)) is not None]
        some = [head for head in heads if not head.call.ops[0].message]
        _check_collective(some)
        if len(some) == len(comm.ranks):
            self.tags += 1
            for head in some:
                yield from self._start(head, 0)

    def _start(self, entry: _Entry, k: int) -> Iterator[Reply]:
        yield Reply(entry.rank, "start", entry.call.number, k, self.tags)
        entry.open.remove(k)
        if not entry.open:
            self.queues[entry.call.comm, entry.rank].popleft()
            del self.entries[entry.rank, entry.call.number]
            yield Reply(entry.rank, "done", entry.call.number)

    # what is wrong

    def stuck(self) -> bool:
        """Whether the hosts of all ranks wait for others, so that none goes on unless it has more threads."""
        blocked = [r for r in range(self.world) if self._blocked(r)]
        return bool(blocked) and len(self.left.union(blocked)) == self.world

    def _blocked(self, rank: int) -> list[_Entry]:
        """The calls that the host of a rank waits for."""
        gated = [e for entries in self.gated.values() for e in entries if e.rank == rank]
        waits = [self.entries[rank, n] for n in self.waiting[rank] if (rank, n) in self.entries]
        return [*gated, *(e for e in waits if e not in gated)]

    def why(self, rank: int, number: int) -> str:
        """What a call waits for, in words."""
        entry = self.entries.get((rank, number))
        if entry is None:
            return f"rank {rank} waits for call {number}, which has started"
        return self._gate_text(entry) if entry.stages else self._queue_text(entry)

    def verdict(self) -> str:
        """What every rank waits for, and the ring in which they do."""
        lines = []
        for rank in range(self.world):
            entries = self._blocked(rank)
            if not entries:
                lines.append(f"rank {rank} has come to its end")
            lines += [self.why(rank, e.call.number) for e in entries]
        ring = self._ring()
        head = f"waiting in a ring: {' -> '.join(map(str, ring))}" if ring else "nothing can go on"
        return head + "".join(f"\n  {line}" for line in lines)

    def _ring(self) -> list[int]:
        """Ranks of which each waits for the next, the first one again at the end; empty if there are none."""
        needs = {r: sorted({p for e in self._blocked(r) for p in self._needs(e)}) for r in range(self.world)}
        path: list[int] = []
        done: set[int] = set()

        def follow(rank: int) -> list[int]:
            if rank in path:
                return [*path[path.index(rank) :], rank]
            if rank in done:
                return []
            path.append(rank)
            found = next((ring for p in needs.get(rank, ()) if (ring := follow(p))), [])
            path.pop()
            done.add(rank)
            return found

        return next((ring for r in needs if (ring := follow(r))), [])

    def _needs(self, entry: _Entry) -> set[int]:
        """The ranks that an entry, or the one at the head of its queue, waits for."""
        if entry.stages:
            return {r for _, late in self._missing(entry) for r in late}
        comm = entry.call.comm
        head = self.queues[comm, entry.rank][0]
        if head.call.ops[0].message:
            return {op.peer for _, op in head.open_ops()}
        return {r for r in comm.ranks if (h := self._head(comm, r)) is None or h.call.ops[0].message}

    def _gate_text(self, entry: _Entry) -> str:
        parts = []
        for (_, *what), late in sorted(self._missing(entry), key=str):
            ranks = _ranks(late)
            if what == ["make"]:
                parts.append(f"for {ranks} to come to its first use")
            elif what == ["connect"]:
                parts.append(f"for {ranks} to come to its first collective")
            else:
                parts.append(f"for {ranks} to connect {what[0]} -> {what[1]}")
        return f"rank {entry.rank} waits in the host at {entry.call} on {entry.call.label} {', '.join(parts)}"

    def _queue_text(self, entry: _Entry) -> str:
        comm = entry.call.comm
        head = self.queues[comm, entry.rank][0]
        behind = "" if head is entry else f" behind {head.call}"
        others = []
        for r in sorted(self._needs(entry)):
            there = self._head(comm, r)
            others.append(f"rank {r} ({f'at {there.call}' if there else 'nothing posted'})")
        return (
            f"rank {entry.rank} waits at {entry.call}{behind} on {entry.call.label} for {', '.join(others)}"
        )


def _check_message(entry: _Entry, op: Op, peer: _Entry, other: Op) -> None:
    if (op.numel, op.dtype) != (other.numel, other.dtype):
        source, target = direction(entry.rank, op)
        raise Broken(
            f"{entry.call.label}: message {source} -> {target}: rank {entry.rank} does {op}, "
            f"rank {peer.rank} does {other}"
        )


def _check_collective(heads: list[_Entry]) -> None:
    """Raises Broken where collectives that meet differ in operation or sizes."""
    first, *others = heads
    a = first.call.ops[0]
    for head in others:
        b = head.call.ops[0]
        if a._replace(splits=None) != b._replace(splits=None) or (a.splits is None) != (b.splits is None):
            raise Broken(f"{first.call.label}: rank {first.rank} does {a}, rank {head.rank} does {b}")
    if a.splits is None:
        return
    at = {rank: k for k, rank in enumerate(first.call.comm.ranks)}
    for x in heads:
        for y in heads:
            sent, taken = x.call.ops[0].splits, y.call.ops[0].splits
            assert sent is not None and taken is not None
            if sent[0][at[y.rank]] != taken[1][at[x.rank]]:
                raise Broken(
                    f"{x.call.label}: rank {x.rank} sends {sent[0][at[y.rank]]} elements to rank {y.rank}, "
                    f"which takes {taken[1][at[x.rank]]}: {x.call.ops[0]}, {y.call.ops[0]}"
                )


def _ranks(ranks: frozenset[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
