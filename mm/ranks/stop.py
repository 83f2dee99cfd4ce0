"""SIGINT, SIGTERM and SIGHUP as one request to end in order, whichever processes of a job receive them.

SIGHUP is what a terminal or a connection that closes sends; a process that nohup has told to ignore it does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds. Signals this close together are one request: a scheduler signals a rank both directly and through
# the launcher, and a busy machine delivers late.
AGAIN_S = 5.0


class StopRequested(Exception):
    """Raised on all ranks alike where one of them was signalled to end, in work that can be abandoned."""


class Requests:
    """Counts requests: signals within AGAIN_S of the last request belong to it."""

    def __init__(self) -> None:
        self.count, self._last = 0, 0.0

    def another(self) -> bool:
        """Whether the signal that has come now is a request of its own; if so, it is counted."""
        now = time.monotonic()
        if self.count and now - self._last < AGAIN_S:
            return False
        self.count, self._last = self.count + 1, now
        return True


def _heard() -> list[signal.Signals]:
    """The signals that this process hears as requests."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # by nohup
    return [s for s in REQUESTS if s != signal.SIGHUP or not ignored]


class Stop:
    """Inside, a request only sets `requested`: the work polls it where it can end in order.

    A second request, AGAIN_S or more after the first, raises KeyboardInterrupt at once.
    rank: this process is a rank; signals stay blocked after the block, so that none ends a rank that is done.
    """

    def __init__(self, *, rank: bool) -> None:
        self.requested = False
        self._rank, self._requests = rank, Requests()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in _heard()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._rank and self._previous:
            signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requests.another() and self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def block_requests() -> Iterator[None]:
    """Processes started inside begin with REQUESTS blocked, until they call unblock_requests()."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_requests() -> None:
    """Receive the signals that were blocked, and those that follow."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextlib.contextmanager
def on_request(act: Callable[[], object]) -> Iterator[Requests]:
    """Call act() in the main thread for each request that comes inside; then restore the earlier handlers."""
    requests = Requests()

    def handle(number: int, frame: object) -> None:
        if requests.another():
            act()

    previous = {s: signal.signal(s, handle) for s in _heard()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
