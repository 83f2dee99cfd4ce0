"""Work over shards in forks of this process: nothing that the work holds is copied or sent to them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from mm.errors import DataError
from mm.forks import leave_inherited, uncollected

T = TypeVar("T")
ALONE = 64 << 20  # bytes of work that is done without other processes


def tasks_of(sizes: Sequence[int]) -> list[range]:
    """Neighbours together, so that a task is of about ALONE / 8 bytes. sizes: of one each, in bytes."""
    tasks, total = list[range](), 0
    for i, size in enumerate(sizes):
        if not tasks or total + size > ALONE // 8:
            tasks.append(range(i, i))
            total = 0
        tasks[-1] = range(tasks[-1].start, i + 1)
        total += size
    return tasks


def in_forks(work: Callable[[range], T], tasks: Sequence[range], workers: int, about: str) -> Iterator[T]:
    """work() of each task, in order; by `workers` processes, or here where one is enough.

    about: what is done to what, for errors. What work() raises is raised here.
    """
    if workers < 2 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    # Forked, so that probes and layouts that this process has registered are there.
    context = multiprocessing.get_context("fork")
    workers = min(workers, len(tasks))
    pipes, processes = list[Connection](), []
    try:
        for n in range(workers):
            mine, theirs = context.Pipe(duplex=False)
            others = [*pipes, mine]
            begin = (work, tasks[n::workers], theirs, others, os.getpid())
            processes.append(context.Process(target=_serve, args=begin, daemon=True))
            with uncollected():
                processes[-1].start()
            theirs.close()
            pipes.append(mine)
        for n in range(len(tasks)):
            try:
                made, error = pipes[n % workers].recv()
            except EOFError as lost:
                raise DataError(
                    f"a process that {about} has ended; the machine may have run out of memory"
                ) from lost
            if error is not None:
                raise error
            yield made
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def _serve(
    work: Callable[[range], T],
    tasks: Sequence[range],
    pipe: Connection,
    others: Sequence[Connection],
    parent: int,
) -> None:
    """In a fork: do tasks and send what they make. A request to stop goes to the parent."""
    leave_inherited()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each fork has a core
    for other in others:
        other.close()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # it ends with its parent, however that ends

    threading.Thread(target=watch, daemon=True).start()
    for task in tasks:
        try:
            pipe.send((work(task), None))
        except Exception as error:
            pipe.send((None, error))
            return
