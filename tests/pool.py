"""A pool of gloo worker processes, started once a test session and reused.

Importing torch costs seconds a process, so a distributed test must not start processes of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class RankFailed(AssertionError):
    """A function failed, or did not answer, on some ranks."""


def _serve(pipe: Connection, log: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with open(log, "w") as stacks:
        while True:
            try:
                task = pipe.recv()
            except (EOFError, KeyboardInterrupt):
                return
            fn, args, rank, world, store, timeout = task
            faulthandler.dump_traceback_later(max(timeout - 1.0, 0.5), file=stacks)
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(store, world),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=timeout),
                )
                reply = (True, fn(*args))
            except BaseException:
                reply = (False, traceback.format_exc())
            finally:
                with contextlib.suppress(Exception):
                    dist.destroy_process_group()
                faulthandler.cancel_dump_traceback_later()
            pipe.send(reply)


class Pool:
    """Workers that run a module-level function as the ranks of a fresh process group."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="pool"))
        self._workers: list[tuple[Any, Connection, Path]] = []
        self._runs = 0

    def _grow(self, n: int) -> None:
        while len(self._workers) < n:
            ours, theirs = self._context.Pipe()
            log = self._folder / f"stacks-{time.monotonic_ns()}"
            process = self._context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours, log))

    def run(self, n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """fn(*args) on n ranks; results in rank order. Raises RankFailed with the remote tracebacks.

        Ranks that do not answer within `timeout` seconds are named, with their stacks, and replaced.
        """
        self._grow(n)
        self._runs += 1
        store = str(self._folder / f"store-{self._runs}")
        workers = self._workers[:n]
        for rank, (_, pipe, _) in enumerate(workers):
            pipe.send((fn, args, rank, n, store, timeout))
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < n:
            pending = {w[1]: r for r, w in enumerate(workers) if r not in replies}
            failed = any(not ok for ok, _ in replies.values())
            left = deadline - time.monotonic()
            # Once a rank has failed, the others may wait for it in vain: give them a moment only.
            ready = wait(list(pending), timeout=max(0.0, min(left, 2.0) if failed else left))
            if not ready:
                break
            for pipe in ready:
                rank = pending[pipe]
                try:
                    replies[rank] = pipe.recv()
                except EOFError:
                    replies[rank] = (False, "the process died")
        silent = [r for r in range(n) if r not in replies]
        dead = [r for r in range(n) if r in replies and replies[r] == (False, "the process died")]
        stacks = self._replace(silent + dead)
        errors = [f"rank {r}:\n{text}" for r, (ok, text) in sorted(replies.items()) if not ok]
        errors += [f"rank {r} did not answer within {timeout} s:\n{stacks[r]}" for r in silent]
        if errors:
            raise RankFailed("\n".join(errors))
        return [replies[r][1] for r in range(n)]

    def _replace(self, ranks: list[int]) -> dict[int, str]:
        stacks = {}
        for r in sorted(ranks, reverse=True):
            process, pipe, log = self._workers.pop(r)
            process.kill()
            process.join()
            pipe.close()
            stacks[r] = log.read_text() if log.exists() else ""
        return stacks

    def close(self) -> None:
        for process, pipe, _ in self._workers:
            pipe.close()
            process.kill()
        for process, _, _ in self._workers:
            process.join()
        self._workers.clear()
