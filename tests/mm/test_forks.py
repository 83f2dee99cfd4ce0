"""Nothing that was there before a fork is collected in it: it may wait for threads that are not there."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from multiprocessing import get_context

import pytest

from mm.forks import fork, leave_inherited, uncollected


class Cycle:
    """Says in which process it was collected."""

    def __init__(self, said: int) -> None:
        self.own, self.said = self, said

    def __del__(self) -> None:
        os.write(self.said, f"{os.getpid()} ".encode())


def busy() -> None:
    """Allocates enough for a collection."""
    kept = [[] for _ in range(1000)]  # type: list[list[int]]
    kept.append([len(kept)])


def before_any_line() -> None:
    """What a fork may have as garbage, and do, before it is ours: Python and packages have hooks there."""
    if _ends:
        Cycle(_ends[0])
        busy()


_ends: list[int] = []  # of pipes; a hook of os.fork() cannot be taken back
os.register_at_fork(after_in_child=before_any_line)


@pytest.fixture
def said() -> Iterator[int]:
    """The end of a pipe that is read. While it is there, a fork begins with garbage."""
    ours, theirs = os.pipe()
    _ends.append(theirs)
    yield ours
    _ends.clear()
    os.close(ours)


def collected(said: int) -> set[int]:
    """The processes that have collected cycles."""
    os.close(_ends.pop())
    return {int(pid) for pid in os.read(said, 65536).split()}


def test_a_fork_collects_nothing_of_its_parent(said: int) -> None:
    pid = fork()
    if pid == 0:
        busy()
        gc.collect()
        os._exit(0 if gc.isenabled() else 1)
    assert os.waitpid(pid, 0)[1] == 0 and gc.isenabled()
    assert not collected(said)


def work() -> None:
    leave_inherited()
    busy()
    gc.collect()
    assert gc.isenabled()


def test_nor_does_a_process_of_a_pool(said: int, processes: None) -> None:
    process = get_context("fork").Process(target=work)
    with uncollected():
        process.start()
    process.join(30)
    assert process.exitcode == 0 and gc.isenabled()
    assert not collected(said)
