"""SIGINT and SIGTERM as one request to end well, to whichever processes of a job they are sent."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM)
# Signals this close together are one request: a scheduler reaches a rank itself and through the launcher, and
# a busy machine delivers late.
AGAIN_S = 5.0


class Asked(Exception):
    """Raised on all ranks alike where one of them was asked to end, in work that can be left."""


class Requests:
    """Which of the signals that come are requests of their own."""

    def __init__(self) -> None:
        self.count, self._last = 0, 0.0

    def another(self) -> bool:
        """Whether the signal that has come now is one; it counts."""
        now = time.monotonic()
        if self.count and now - self._last < AGAIN_S:
            return False
        self.count, self._last = self.count + 1, now
        return True


class Stop:
    """Until its end, a request only sets `asked`: whoever works looks at it where work can end well. A second
    request, well after the first, does not wait: it raises KeyboardInterrupt.

    rank: this process is a rank, and no request is to end it once its work is done.
    """

    def __init__(self, *, rank: bool) -> None:
        self.asked = False
        self._rank, self._requests = rank, Requests()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._ask) for s in REQUESTS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._rank and self._previous:
            signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._requests.another() and self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def hold_requests() -> Iterator[None]:
    """Processes started inside begin with requests held back, until they hear_requests()."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_requests() -> None:
    """Have what was held back come, and what follows."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)


@contextlib.contextmanager
def on_request(act: Callable[[], object]) -> Iterator[Requests]:
    """Inside, act() is called for each request, in the main thread; earlier handlers are back after."""
    requests = Requests()

    def handle(number: int, frame: object) -> None:
        if requests.another():
            act()

    previous = {s: signal.signal(s, handle) for s in REQUESTS}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
