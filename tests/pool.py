"""A pool of gloo worker processes, started once a test session and reused.

Importing torch costs seconds a process, so a distributed test must not start processes of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

START_S = 120.0  # a busy machine may need long to import torch; a test's own timeout starts after that
GRACE_S = 2.0  # what the others get once a rank has failed: they may wait for it in vain


# Torch's caches of tensor layouts keep meshes, and so the threads of groups that were destroyed long ago.
MOST_THREADS = 250
FEW_THREADS = 80  # beyond these a worker looks for meshes that only cycles keep: most of a job's


class RankFailed(AssertionError):
    """A function failed, or did not answer, on some ranks."""


@dataclass(frozen=True)
class Worker:
    """A process, our end of its pipe, and the file that its stacks go to when it is asked for them."""

    process: BaseProcess
    pipe: Connection
    stacks: Path


def _serve(pipe: Connection, stacks: str) -> None:
    import torch

    import mm.train.trainer  # noqa: F401  most of what tests import

    torch.set_num_threads(1)
    gc.freeze()  # a full collection would look at all of it, for 0.3 s in the midst of a test
    with open(stacks, "w") as file:
        # The parent asks with a signal, which works in a blocked collective too.
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send(True)
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, KeyboardInterrupt):
                return
            reply = _run(message)
            try:
                data = pickle.dumps(reply)
            except Exception:
                data = pickle.dumps((False, f"the result cannot be sent back:\n{traceback.format_exc()}"))
            pipe.send_bytes(data)


def _run(message: bytes) -> tuple[bool, Any]:
    import torch.distributed as dist

    # Only now: all ranks have answered, so that none closes connections while another still makes its own.
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    if _threads(os.getpid()) > FEW_THREADS:
        gc.collect()
    try:
        fn, args, begin, rank, world, store, timeout = pickle.loads(message)  # imports the test's module
        begin(rank, world, store, timeout)
        return True, fn(*args)
    except BaseException:
        return False, traceback.format_exc()


def begin_gloo(rank: int, world: int, store: str, timeout: float) -> None:
    """Make the default process group. store: a file; timeout in seconds."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    dist.barrier()  # all are connected, should one fail at once


class Pool:
    """Workers that run a module-level function as the ranks of a fresh default process group."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="polyrank-pool-"))
        self._workers: list[Worker] = []
        self._runs = 0

    def _grow(self, n: int) -> None:
        if any(_threads(w.process.pid) > MOST_THREADS for w in self._workers):
            self._discard(self._workers)
        self._discard(w for w in self._workers if not w.process.is_alive())
        fresh = [self._start() for _ in range(n - len(self._workers))]  # together: they import at once
        deadline = time.monotonic() + START_S
        if not all(worker.pipe.poll(max(0.0, deadline - time.monotonic())) for worker in fresh):
            self._discard(fresh)  # one that comes late would greet in the place of an answer
            raise RankFailed(f"a worker did not start within {START_S:.0f} s")
        for worker in fresh:
            worker.pipe.recv()

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        stacks = self._folder / f"stacks-{time.monotonic_ns()}"
        process = self._context.Process(target=_serve, args=(theirs, str(stacks)), daemon=True)
        process.start()
        theirs.close()
        worker = Worker(process, ours, stacks)
        self._workers.append(worker)
        return worker

    def run(
        self,
        n: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        begin: Callable[[int, int, str, float], None] = begin_gloo,
    ) -> list[Any]:
        """fn(*args) on n ranks; results in rank order. Raises RankFailed with the remote tracebacks.

        begin: makes a rank's default process group, given rank, world size, a file for its store, `timeout`.
        Ranks that do not answer within `timeout` seconds are named, with their stacks, and replaced.
        """
        self._grow(n)
        self._runs += 1
        store = str(self._folder / f"store-{self._runs}")
        workers = self._workers[:n]
        for rank, worker in enumerate(workers):
            worker.pipe.send_bytes(pickle.dumps((fn, args, begin, rank, n, store, timeout)))
        replies, dead = _collect(workers, timeout)
        silent = [r for r in range(n) if r not in replies and r not in dead]
        stacks = {r: _stacks(workers[r]) for r in silent}
        self._discard([workers[r] for r in [*silent, *dead]])
        errors = [f"rank {r}:\n{text}" for r, (ok, text) in sorted(replies.items()) if not ok]
        errors += [f"rank {r} died: {_ending(workers[r].process)}" for r in dead]
        errors += [f"rank {r} gave no answer (limit {timeout:g} s):\n{stacks[r]}" for r in silent]
        if errors:
            raise RankFailed("\n".join(errors))
        return [replies[r][1] for r in range(n)]

    def _discard(self, workers: Iterable[Worker]) -> None:
        for worker in list(workers):
            self._workers.remove(worker)
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def close(self) -> None:
        """End the workers and remove what they wrote."""
        self._discard(self._workers)
        shutil.rmtree(self._folder, ignore_errors=True)


def _threads(pid: int | None) -> int:
    """Threads of a process; 0 where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def _collect(workers: list[Worker], timeout: float) -> tuple[dict[int, tuple[bool, Any]], list[int]]:
    """(replies by rank, ranks that died); ranks in neither did not answer in time."""
    replies: dict[int, tuple[bool, Any]] = {}
    pending = {worker.pipe: rank for rank, worker in enumerate(workers)}
    dead: list[int] = []
    deadline = time.monotonic() + timeout
    while pending:
        if dead or not all(ok for ok, _ in replies.values()):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                replies[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                dead.append(rank)
    return replies, dead


def _stacks(worker: Worker, wait_s: float = 1.0) -> str:
    """Where each thread of a worker is now; empty where it cannot even say that."""
    pid = worker.process.pid
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and not worker.stacks.stat().st_size:
        time.sleep(0.02)
    time.sleep(0.05)  # the rest of the stack
    return worker.stacks.read_text()


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    assert code is not None
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
