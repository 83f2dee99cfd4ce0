"""Ranks traced side by side, each in a process of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from mm.forks import leave_inherited, uncollected
from mm.virtual.records import Trace

TraceRank = Callable[[int], Trace]


def trace_ranks(trace: TraceRank, ranks: Sequence[int], workers: int) -> list[Trace]:
    """The traces of `ranks`, in their order, at most `workers` at a time; 1 traces them in this process.

    With more, a process is forked for each rank: this one must not have run a backward on an accelerator,
    whose threads do not outlive a fork. Raises RuntimeError with the traceback of a rank that fails.
    """
    if workers <= 1 or len(ranks) <= 1:
        return [trace(r) for r in ranks]
    found: dict[int, Trace] = {}
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    waiting = list(reversed(ranks))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                pipe, process = _start(trace, waiting[-1])
                running[pipe] = waiting.pop(), process
            for done in wait(list(running)):
                assert isinstance(done, Connection)
                rank, process = running.pop(done)
                found[rank] = _received(done, rank)
                process.join()
    finally:
        for _, process in running.values():
            process.kill()
    return [found[r] for r in ranks]


def _start(trace: TraceRank, rank: int) -> tuple[Connection, BaseProcess]:
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(trace, rank, theirs), daemon=True)
    with uncollected():
        process.start()
    theirs.close()  # so that its end is the end of the pipe
    return ours, process


def _work(trace: TraceRank, rank: int, pipe: Connection) -> None:
    leave_inherited()
    try:
        pipe.send(trace(rank))
    except Exception:
        pipe.send(traceback.format_exc())


def _received(pipe: Connection, rank: int) -> Trace:
    try:
        found = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process that traced rank {rank} ended without a result") from None
    if not isinstance(found, Trace):
        raise RuntimeError(f"rank {rank} could not be traced:\n{found}")
    return found
