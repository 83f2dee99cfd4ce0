"""Two computations of one rank that take turns: while a message of one is under way, the other computes.

Each has a thread of its own, and exactly one of the two runs at any time. They change places where they hand
over, and nowhere else. So the order of all that the rank computes and sends is a function of the two alone,
and is the same on all ranks whose computations are alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from threading import Semaphore
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from parallel.topology.axis import HandsOver

Computation = Callable[[], Any]


class Own(Protocol):
    """State outside the two computations that each must find as it left it."""

    def save(self) -> Any:
        """The state now."""

    def load(self, saved: Any) -> None:
        """Make the state what it was."""


class Ran(NamedTuple):
    """How a computation went. result: what it returned. start, end: time.perf_counter() in seconds. seconds:
    for how long of that it had the turn."""

    result: Any
    start: float
    end: float
    seconds: float


class _Abandoned(BaseException):
    """Ends a computation whose partner has failed."""


class Turns:
    """The turns of a rank's two computations; of one alone while none are there.

    device: whose current stream both use.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._own: Own | None = None
        self._begin([False, False])

    def _begin(self, running: list[bool]) -> None:
        self._go = (Semaphore(0), Semaphore(0))
        self._left = running  # of each of the two, whether it has not ended
        self._turn = 0
        self._failed: BaseException | None = None
        self._saved: list[Any] = [None, None]
        self._since, self._spent = time.perf_counter(), [0.0, 0.0]

    @property
    def shared(self) -> bool:
        """Whether another computation is there to take the turn."""
        return self._left[1 - self._turn]

    def hand_over(self) -> None:
        """Let the other computation run until it hands over or ends; nothing where there is none."""
        if self.shared:
            me = self._turn
            self._pass_on()
            self._go[me].acquire()
            if self._failed is not None:
                raise _Abandoned

    def run(self, first: Computation, second: Computation, own: Own | None = None) -> tuple[Ran, Ran]:
        """Both computations; `first` begins, in a thread of its own with the modes of the caller's.

        own: both begin with what it is now; after both it is as `second` has left it.
        Raises the error of the one that fails first, with its traceback; the other is ended where it would
        have gone on.
        """
        assert not any(self._left), "turns are taken by two"
        self._begin([True, True])
        self._own = own
        if own is not None:
            self._saved = [own.save()] * 2
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "turns")
        inherited, context = _inherited(self._device), copy_context()
        thread: Future[Ran | None] = self._pool.submit(context.run, self._first, first, inherited)
        ran = None
        try:
            self._go[1].acquire()
            ran = self._timed(1, second)
        except _Abandoned:
            pass
        except BaseException as error:  # an interrupt too must not leave the thread behind
            self._failed = self._failed or error
        finally:
            self._left[1] = False
            while self._left[0]:
                if self._turn == 1:
                    self._pass_on()
                self._go[1].acquire()
        other = thread.result()
        self._spent[self._turn] += time.perf_counter() - self._since
        failed, self._failed = self._failed, None  # it would keep what its frames hold
        if failed is not None:
            raise failed
        assert ran is not None and other is not None
        return other._replace(seconds=self._spent[0]), ran._replace(seconds=self._spent[1])

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _first(self, first: Computation, inherited: Callable[[], ExitStack]) -> Ran | None:
        try:
            with inherited():
                return self._timed(0, first)
        except _Abandoned:
            return None
        except BaseException as error:
            self._failed = self._failed or error
            return None
        finally:
            self._left[0] = False
            self._pass_on()

    def _timed(self, me: int, computation: Computation) -> Ran | None:
        if self._failed is not None:
            return None
        start = time.perf_counter()
        return Ran(computation(), start, time.perf_counter(), 0.0)

    def _pass_on(self) -> None:
        """Give the turn to the other computation, with its state."""
        me, now = self._turn, time.perf_counter()
        self._spent[me] += now - self._since
        self._since, self._turn = now, 1 - me
        if self._own is not None:
            self._saved[me] = self._own.save()
            self._own.load(self._saved[1 - me])
        self._go[1 - me].release()


def in_turns(turns: HandsOver | None, start: Callable[[bool], dist.Work | None]) -> None:
    """Carry out an operation, while another computation of the rank runs where one is there.

    start: starts the operation; given True it returns at once with a handle. All ranks of the operation must
    have another computation there, or none of them.
    """
    work = start(turns is not None and turns.shared)
    if work is not None:
        assert turns is not None
        turns.hand_over()
        work.wait()


def _inherited(device: torch.device) -> Callable[[], ExitStack]:
    """What makes another thread compute as this one does: the gradient mode, torch's modes, the stream.

    The project uses no autocast, and hooks on saved tensors only inside a computation.
    """
    learns = torch.is_grad_enabled()
    functions: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = [*functions, *_get_current_dispatch_mode_stack()]
    module = None if device.type == "cpu" else torch.get_device_module(device)
    stream = None if module is None else module.current_stream()

    def enter() -> ExitStack:
        entered = ExitStack()
        entered.enter_context(torch.set_grad_enabled(learns))
        if module is not None:
            entered.enter_context(module.stream(stream))
        for mode in modes:
            entered.enter_context(mode)
        return entered

    return enter
