"""A rank's line to the referee: posts calls, starts operations when told to, waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from typing import Any

from tests.strict.calls import Call, Comm, Key, Op, meetings
from tests.strict.referee import Reply

SILENT_S = 0.02  # waits that are shorter are not told to the referee

Start = Callable[[int], Any]  # starts an operation in the inner group with a tag; its handle, if there is one


@dataclass
class Posted:
    """A call under way. works: of the inner group, by operation. complete: all have started. `done` is set
    where the run was cut off too."""

    call: Call
    starts: Sequence[Start]
    works: dict[int, Any] = field(default_factory=dict)
    passed: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    complete: bool = False
    error: str | None = None


class Link:
    """The line of `rank` to the server at `address`. eager: as in Referee."""

    def __init__(self, address: str, rank: int, *, eager: bool, timeout_s: float) -> None:
        self.rank, self.eager, self.timeout_s = rank, eager, timeout_s
        self.groups: list[
            Any
        ] = []  # those of this rank that are in use, in the order in which they were made
        self._line = Client(address, "AF_UNIX")
        self._line.send(rank)
        self._lock = threading.Lock()
        self._posted: dict[int, Posted] = {}
        self._number = 0
        self._met: set[Key] = set()
        self._over: str | None = None
        self._answer: tuple[threading.Event, list[str]] = (threading.Event(), [])
        threading.Thread(target=self._hear, daemon=True).start()

    def post(
        self, comm: Comm, ops: Sequence[Op], starts: Sequence[Start], *, label: str, batch: bool
    ) -> Posted:
        """Issue a call. The calling thread waits where hosts meet at a first use."""
        with self._lock:
            self._number += 1
            call = Call(self._number, comm, tuple(ops), label, batch)
            posted = Posted(call, starts)
            self._posted[call.number] = posted
            self._tell("post", call)
        first = set().union(*meetings(self.rank, call, self.eager)) - self._met
        if first:
            if not posted.passed.wait(self.timeout_s):
                raise RuntimeError(f"strict: {self._why(call)} (limit {self.timeout_s:g} s)")
            self._met |= first
        self._check(posted)
        return posted

    def wait(self, posted: Posted, timeout_s: float) -> None:
        """Wait until a call is complete. Raises RuntimeError naming what it waits for."""
        limit = timeout_s if timeout_s > 0 else self.timeout_s
        deadline = time.monotonic() + limit
        if not posted.done.wait(min(SILENT_S, limit)):
            with self._lock:
                self._tell("wait", posted.call.number)
            came = posted.done.wait(max(0.0, deadline - time.monotonic()))
            if not came:
                raise RuntimeError(f"strict: {self._why(posted.call)} (limit {limit:g} s)")
            with self._lock:
                self._tell("go on", posted.call.number)
        self._check(posted)
        for work in posted.works.values():
            if work is not None:
                work.wait()
        posted.works.clear()

    def close(self) -> None:
        """This rank has come to its end. The server then hangs up, which ends the thread that hears it."""
        with self._lock:
            self._tell("leave", None)

    def _check(self, posted: Posted) -> None:
        if self._over is not None and not posted.complete:
            raise RuntimeError(f"strict: {self._over}")
        if posted.error is not None:
            raise RuntimeError(f"strict: {posted.call}: {posted.error}")

    def _why(self, call: Call) -> str:
        arrived, texts = self._answer
        arrived.clear()
        with self._lock:
            self._tell("why", call.number)
        return texts[-1] if arrived.wait(5) else f"{call} on {call.label}, and the referee does not answer"

    def _tell(self, kind: str, given: object) -> None:
        with contextlib.suppress(OSError):  # the run is over
            self._line.send((kind, given))

    def _hear(self) -> None:
        with self._line, contextlib.suppress(EOFError, OSError):
            while True:
                message = self._line.recv()
                if isinstance(message, Reply):
                    self._follow(message)
                elif message[0] == "why":
                    self._answer[1].append(message[1])
                    self._answer[0].set()
                else:
                    self._end(message[1])
        self._end("the run is over")

    def _follow(self, reply: Reply) -> None:
        posted = self._posted[reply.number]
        if reply.kind == "passed":
            posted.passed.set()
        elif reply.kind == "start":
            try:
                posted.works[reply.op] = posted.starts[reply.op](reply.tag)
            except Exception as error:
                posted.error = str(error)
        else:
            del self._posted[reply.number]
            posted.complete = True
            posted.done.set()

    def _end(self, why: str) -> None:
        with self._lock:
            self._over = self._over or why
            for posted in self._posted.values():
                posted.passed.set()
                posted.done.set()
