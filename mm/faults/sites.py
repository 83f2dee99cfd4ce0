"""Whether a thread waits for other ranks, by where it is: found out from outside, at no cost to it."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from types import FrameType, TracebackType
from typing import NamedTuple

import mm

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(mm.__file__)))
_OURS = tuple(os.path.join(_ROOT, room) + os.sep for room in ("mm", "parallel", "encoders", "llm"))
_LIBRARY = os.path.dirname(os.path.abspath(threading.__file__)) + os.sep
# Files in which a thread only ever waits for other ranks: their calls return when an exchange is done.
_EXCHANGES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "mm/ranks/control.py",
)
_DEPTH = 40


class Site(NamedTuple):
    """Where a thread is. name: its function. waits: for other ranks. stack: a digest of its calls."""

    name: str
    waits: bool
    stack: int


def site_of(thread: int) -> Site | None:
    """Where a thread is now, by its identifier; None where there is no such thread.

    Of a rank that runs two computations in turns, the one that has the turn.
    """
    frames = sys._current_frames()
    frame = frames.get(thread)
    if frame is None:
        return None
    found = _site(frame)
    if found.name == _TURNS:
        turns = next((t.ident for t in threading.enumerate() if t.name.startswith("turns")), None)
        other = frames.get(turns) if turns is not None else None
        if other is not None:
            found = _site(other)
    return found


_TURNS = "another turn"


def _site(frame: FrameType | None) -> Site:
    calls: list[tuple[str, int]] = []
    at = frame
    while at is not None and len(calls) < _DEPTH:
        calls.append((at.f_code.co_name, at.f_lasti))
        at = at.f_back
    stack = hash(tuple(calls))
    for _ in calls:
        assert frame is not None
        # A frame that is being left may have no line.
        file, line = frame.f_code.co_filename, frame.f_lineno or 0
        if not _passed_over(file):
            if file.endswith("parallel/comm/turns.py") and ".acquire(" in linecache.getline(file, line):
                return Site(_TURNS, False, stack)
            return Site(frame.f_code.co_name, waits_at(file, line), stack)
        frame = frame.f_back
    return Site("", False, stack)


def _passed_over(file: str) -> bool:
    """Whether the caller tells more: of the standard library, and of torch's look-up of operators."""
    if "site-packages" not in file and (file.startswith(_LIBRARY) or file.startswith("<")):
        return True
    return file.endswith(("torch/_ops.py", "torch/utils/_contextlib.py", "torch/distributed/c10d_logger.py"))


def waits_at(file: str, line: int) -> bool:
    """Whether code at a line of a file waits for other ranks."""
    file = file.replace(os.sep, "/")
    if file.endswith(_EXCHANGES):
        return True
    ours = file.startswith(tuple(o.replace(os.sep, "/") for o in _OURS))
    return (ours or "torch/distributed/" in file) and ".wait(" in linecache.getline(file, line)


def broke_at_exchange(error: BaseException) -> bool:
    """Whether an error is of a message between ranks, so that another rank may be the reason."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError):
            at: TracebackType | None = seen.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            if "third_party/gloo" in str(seen):
                return True
            if at is not None and waits_at(at.tb_frame.f_code.co_filename, at.tb_lineno):
                return True
        seen = seen.__cause__ or seen.__context__
    return False
