"""Processes that are forked from a rank, and what must not happen in them.

A fork has the parent's objects, and none of its threads. Reference cycles hold process groups, whose end
waits for their threads: were they collected in a fork, that would hang or crash. So nothing that the parent
had is ever collected there. That also keeps pages shared, which a collection would write to.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def fork() -> int:
    """os.fork(), whose child never collects what was there before it."""
    with uncollected():
        pid = os.fork()
        if pid == 0:
            leave_inherited()
    return pid


@contextmanager
def uncollected() -> Iterator[None]:
    """While processes are forked: these begin without collection, and go on with leave_inherited()."""
    enabled = gc.isenabled()
    gc.disable()  # Python itself allocates in a fork before any of our lines
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leave_inherited() -> None:
    """In a fork: what there is now is never collected, what comes may be."""
    gc.freeze()
    gc.enable()
