"""Worker processes that read and decode ahead of the step; those that die or hang are named and replaced.

The tasks of a step are dealt in orders of a few tasks. A worker has several, so that it goes on while the
rank does something else, and a tray for each. Which worker does what, and when, changes no result.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

from mm.data.reader import BadSample
from mm.errors import DataError, PolyrankError
from mm.ranks.decoding import (
    DONE,
    PLACE,
    Ahead,
    Decode,
    Decoded,
    Order,
    Room,
    Task,
    Tray,
    attempt,
    small,
    unpacked,
    work,
)
from mm.ranks.nursery import Nursery
from mm.ranks.shared import SharedMemory

TRAYS = 4  # orders that a worker has at once
TRAY_BYTES = 256 << 20  # of addresses; memory is taken for what is used of them
SHARED_BYTES = 2 << 30  # of addresses too, for the tensors of all batches that are there at once
ORDER_TASKS = 16  # at most, in an order
SHARES = 2  # orders at least that a worker gets of a step which has as many tasks
TRIES = 2  # of a task at which workers die; then its sample is bad
STILLBORN = 5  # workers in a row that die before their first task
POLL_S = 0.5  # how often workers that say nothing are looked at


@dataclass
class Ticket:
    """The tasks of a step.

    places: where their tensors belong. found: their results so far. left: how many are missing.
    """

    tasks: Sequence[Task]
    places: Sequence[Tensor | None]
    found: list[Decoded | None]
    left: int


@dataclass
class _Piece:
    """Tasks of a ticket that go to a worker together."""

    ticket: Ticket
    which: list[int]  # numbers of the tasks in the ticket


@dataclass
class _Worker:
    number: int
    pid: int
    pipe: Connection
    trays: tuple[Tray, ...]
    orders: deque[tuple[int, int, _Piece]] = field(default_factory=deque)  # number, tray, what it is about
    place: tuple[int, int] = (-1, -1)  # where it was when it was last looked at
    quiet_s: float = 0.0  # for how long it has been there


class Workers:
    """Processes that carry out tasks for one rank.

    decode: what a task is; workers have what it refers to as it is when they are made. count: of workers; 0:
    results() does all in the caller's thread. timeout_s: longest time that one task may take in a worker.
    ahead: is given the tasks that come next, before the first of them.

    One thread submits and asks for results; any may ask for notes, or stop.
    """

    def __init__(
        self,
        decode: Decode,
        count: int,
        rank: int,
        timeout_s: float,
        ahead: Ahead = lambda tasks: None,
    ) -> None:
        self._ahead = ahead
        self._decode, self._rank, self._timeout_s = decode, rank, timeout_s
        self._waiting: deque[_Piece] = deque()
        self._tried: dict[tuple[int, str], int] = {}  # by sample and part, at how many deaths
        self._notes: deque[str] = deque()
        self._orders = self._stillborn = 0
        self._stopped = False
        self._looked = time.monotonic()
        self._workers: list[_Worker] = []
        self._nursery: Nursery | None = None
        if count:
            self._memory = SharedMemory(SHARED_BYTES)
            trays = [tuple(Tray.new(TRAY_BYTES) for _ in range(TRAYS)) for _ in range(count)]
            self._places = memoryview(mmap.mmap(-1, PLACE.size * count))

            def serve(number: int, pipe: Connection) -> None:
                # Its own limit is for a worker whose rank has gone: the rank looks first.
                room = Room(self._memory, trays[number])
                work(pipe, room, self._place(number), decode, 2 * timeout_s, ahead)

            self._nursery = Nursery(serve, rank)
            self._workers = [_Worker(n, *self._nursery.start(n), trays[n]) for n in range(count)]

    @property
    def pids(self) -> list[int]:
        """The workers' processes."""
        return [w.pid for w in self._workers]

    def notes(self) -> list[str]:
        """What has happened to workers since this was last asked, in words."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any values, which workers can write to while it is a place of a task."""
        return self._memory.empty(shape, dtype) if self._workers else torch.empty(shape, dtype=dtype)

    def submit(self, tasks: Sequence[Task], places: Sequence[Tensor | None] | None = None) -> Ticket:
        """Begin tasks; results() gives what they give. places: by task, memory for its tensor, contiguous, of
        empty() or any other, which is used where it fits what a worker gives."""
        places = [None] * len(tasks) if places is None else places
        assert len(places) == len(tasks)
        ticket = Ticket(tasks, places, [None] * len(tasks), len(tasks))
        if self._workers:
            # Parts of a shard are read in the order in which they lie there.
            order = sorted(range(len(tasks)), key=lambda n: (tasks[n].part.shard, tasks[n].part.offset))
            size = max(1, min(ORDER_TASKS, -(-len(tasks) // (SHARES * len(self._workers)))))
            for at in range(0, len(order), size):
                self._waiting.append(_Piece(ticket, order[at : at + size]))
            self._deal()
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Do not begin what is left of a ticket; nobody will ask for its results."""
        self._waiting = deque(piece for piece in self._waiting if piece.ticket is not ticket)

    def results(self, ticket: Ticket) -> list[Decoded]:
        """What each task gives, in order.

        Raises PolyrankError for a task that fails for another reason than its sample, and where workers
        cannot be started or stop() was called.
        """
        if not self._workers:
            self._ahead(ticket.tasks)
            both = zip(ticket.tasks, ticket.places, strict=True)
            return [attempt(self._decode, task, place) for task, place in both]
        self._looked = time.monotonic()
        while ticket.left:
            if self._stopped:
                raise PolyrankError(f"the workers of rank {self._rank} are to end")
            pipes = {w.pipe: w for w in self._workers if w.orders}
            for pipe in wait(list(pipes), POLL_S):
                assert isinstance(pipe, Connection)
                self._hear(pipes[pipe])
            self._look()
            self._deal()
        found = [one for one in ticket.found if one is not None]
        assert len(found) == len(ticket.tasks)
        return found

    def _deal(self) -> None:
        """Give pieces to workers that have a tray to spare, the least busy first."""
        while self._waiting:
            worker = min(self._workers, key=lambda w: len(w.orders))
            if len(worker.orders) == TRAYS:
                return
            piece = self._waiting[0]
            tray = next(n for n in range(TRAYS) if n not in [o[1] for o in worker.orders])
            tasks = small([piece.ticket.tasks[n] for n in piece.which])
            places = [piece.ticket.places[n] for n in piece.which]
            shared = [None if own is None else self._memory.place(own) for own in places]
            self._orders += 1
            try:
                worker.pipe.send(Order(self._orders, tray, tasks, shared))
            except OSError:
                self._replace(worker, "")
                continue
            self._waiting.popleft()
            worker.orders.append((self._orders, tray, piece))

    def _hear(self, worker: _Worker) -> None:
        """Take a worker's results, or note that it has ended."""
        try:
            said = json.loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker, "")
            return
        _, tray, piece = worker.orders.popleft()
        self._stillborn = 0
        given = worker.trays[tray].filled(said["used"])
        for n, answer in zip(piece.which, said["answers"], strict=False):
            task = piece.ticket.tasks[n]
            if "refused" in answer:
                raise DataError(f"{_named(task)}: {answer['refused']}")
            if "failed" in answer:
                raise PolyrankError(f"{_named(task)} failed in worker {worker.pid}:\n{answer['failed']}")
            self._keep(piece.ticket, n, unpacked(answer, given, task, piece.ticket.places[n]))
        rest = piece.which[len(said["answers"]) :]
        if rest and not said["answers"]:  # its result is larger than a tray
            self._keep(piece.ticket, rest[0], attempt(self._decode, piece.ticket.tasks[rest[0]]))
            rest = rest[1:]
        if rest:
            self._waiting.appendleft(_Piece(piece.ticket, rest))

    def _keep(self, ticket: Ticket, n: int, found: Decoded) -> None:
        ticket.found[n] = found
        ticket.left -= 1

    def _look(self) -> None:
        """Kill workers that have been at one task for too long."""
        now = time.monotonic()
        # A job that was stopped as a whole, and goes on, has not hung for that time.
        passed, self._looked = min(now - self._looked, 2 * POLL_S), now
        for worker in [w for w in self._workers if w.orders]:
            place = PLACE.unpack_from(self._place(worker.number))
            worker.quiet_s = worker.quiet_s + passed if place == worker.place else 0.0
            worker.place = place
            if worker.quiet_s > self._timeout_s:
                os.kill(worker.pid, signal.SIGKILL)
                self._replace(worker, f" (it had not answered for {self._timeout_s:g} s)")

    def _replace(self, worker: _Worker, why: str) -> None:
        """Start another worker in place of one that has ended, and have done again what it has not done."""
        assert self._nursery is not None
        code = self._nursery.reap(worker.pid)
        number, n = PLACE.unpack_from(self._place(worker.number))
        began = bool(worker.orders) and number == worker.orders[0][0] and n != DONE
        at = f"while it decoded {_named(self._at(worker, n))}" if began else "between tasks"
        ended = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        lost = [piece for _, _, piece in worker.orders]
        pid, pipe, place = worker.pid, worker.pipe, self._place(worker.number)
        pipe.close()
        place[:] = bytes(PLACE.size)
        worker.pid, worker.pipe = self._nursery.start(worker.number)
        said = f"worker {pid} of rank {self._rank} {ended}{why} {at}; {worker.pid} replaces it"
        self._notes.append(said)
        self._stillborn = 0 if began else self._stillborn + 1
        if self._stillborn == STILLBORN:
            raise PolyrankError(f"{STILLBORN} workers in a row have ended before a task: {said}")
        worker.orders.clear()
        worker.place, worker.quiet_s = (-1, -1), 0.0
        if began:
            self._charge(lost[0], n, ended + why)
        self._waiting.extendleft(piece for piece in reversed(lost) if piece.which)

    def _at(self, worker: _Worker, n: int) -> Task:
        piece = worker.orders[0][2]
        return piece.ticket.tasks[piece.which[n]]

    def _charge(self, piece: _Piece, n: int, ended: str) -> None:
        """Count a worker's end against the task that it was at, which is given up after TRIES of them."""
        task = piece.ticket.tasks[piece.which[n]]
        key = task.sample.id, task.part.name
        self._tried[key] = self._tried.get(key, 0) + 1
        if self._tried[key] == TRIES:
            why = f"{task.part.name}: {TRIES} workers have ended at it; the last {ended}"
            self._keep(piece.ticket, piece.which.pop(n), BadSample(task.sample, why))
            del self._tried[key]

    def _place(self, number: int) -> memoryview:
        return self._places[PLACE.size * number : PLACE.size * (number + 1)]

    def stop(self) -> None:
        """Let results() in another thread wait for nothing more."""
        self._stopped = True

    def close(self) -> None:
        """End the workers and their nursery."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        for worker in self._workers:
            worker.pipe.close()
        self._workers = []
        self._waiting.clear()


def _named(task: Task) -> str:
    return f"{task.part.name} of sample {task.sample.name} of {task.part.shard}"
