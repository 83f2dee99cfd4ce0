"""A process of rank 0 that copies checkpoints to a target, so that training never waits for a store.

It is forked by a nursery (mm/ranks/nursery.py), which ends it when its rank has ended, so a rank that is
killed leaves no copier behind. What it has begun is not in the target's index then, and is removed before the
next copy.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from mm.checkpoint.remote.copies import Copies
from mm.checkpoint.remote.index import step_of
from mm.checkpoint.remote.note import Note, write_note
from mm.config.schema import CheckpointConfig
from mm.data.remote.folder import Folder, Pace
from mm.data.remote.urls import scrub
from mm.errors import PolyrankError
from mm.ranks.nursery import Nursery

NICE = 10  # where cores are few, training comes first
AGAIN_S = 2.0  # before what has failed is tried again, while a job waits for its last copy


class Begin(NamedTuple):
    """To the process: whose copies they are (Copies)."""

    run: str
    session: str
    first: int


class Said(NamedTuple):
    """From the process. copied: a checkpoint that is there now. why: what has failed, "" for nothing. seen:
    the number of the request that this is the end of, 0 where it goes on."""

    copied: str | None = None
    why: str = ""
    seen: int = 0


class Copier:
    """Copies what is new in a run's folder, whenever it is asked to.

    info, warn: hear of the first of several failures, of the end of them, and of how the last copy went.
    """

    def __init__(self, directory: Path, rules: CheckpointConfig) -> None:
        self._nursery = Nursery(partial(_serve, directory, rules), 0)
        self._rules = rules.remote
        self._begin: Begin | None = None
        self._pipe: Connection | None = None
        self._asked = self._seen = 0
        self._failed = self._over = False
        self._newest: str | None = None
        self.info: Callable[[str], object] = lambda text: None
        self.warn: Callable[[str], object] = lambda text: None

    def begin(self, run: str, first: int) -> None:
        """Copy from now on. run: that the target belongs to. first: step after which this start goes on."""
        self._begin = Begin(run, uuid.uuid4().hex, first)
        self.wake()

    def wake(self) -> None:
        """Say that there may be something to copy."""
        if self._begin is None or self._over:
            return
        try:
            if self._pipe is None:
                self._pipe = self._nursery.start(0)[1]
                self._pipe.send(self._begin)
            self._asked += 1
            self._pipe.send(self._asked)
        except OSError:
            self._gone()
        except PolyrankError as error:
            self._over = True
            self._fail(f"{error}; nothing is copied any more")

    @property
    def busy(self) -> bool:
        """Whether something is being copied, or looked for."""
        return self._pipe is not None and self._seen < self._asked

    def hear(self, seconds: float = 0.0) -> None:
        """Take in what the process has said; waits up to `seconds` while it is busy."""
        deadline = time.monotonic() + seconds
        while self._pipe is not None and self.busy:
            try:
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    return
                said: Said = self._pipe.recv()
            except (EOFError, OSError):
                self._gone()
                return
            self._seen = max(self._seen, said.seen)
            if said.why:
                self._fail(said.why)
                continue
            if said.copied is not None:
                self._newest = max(said.copied, self._newest or said.copied, key=step_of)
            if self._failed:
                self.info(f"checkpoints are copied to {self._rules.url} again")
            self._failed = False

    def last(self, begun: float) -> bool:
        """Whether a job that waits since `begun` need not wait any longer for the last copy; looks for up to
        half a second. What fails is tried again as long as there is time (checkpoint.remote.wait_s)."""
        left = begun + self._rules.wait_s - time.monotonic()
        self.hear(max(0.0, min(0.5, left)))
        if not self.busy and not self._failed:
            if self._newest is not None:
                self.info(f"copied to {self._rules.url}: {self._newest}")
            return True
        if left <= 0 or self._over:
            self.warn(
                f"the last checkpoint is not copied to {self._rules.url} after {self._rules.wait_s:g} s "
                "(checkpoint.remote.wait_s); it is in the run's folder, and the same command copies it"
            )
            return True
        if not self.busy:
            time.sleep(max(0.0, min(AGAIN_S, left)))
            self.wake()
        return False

    def close(self) -> None:
        """End the process, with whatever it is copying."""
        if self._pipe is not None:
            self._pipe.close()
        self._nursery.close()

    def _gone(self) -> None:
        assert self._pipe is not None
        self._pipe.close()
        self._pipe, self._seen = None, self._asked
        self._fail("the process that copies has ended")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self.warn(
                f"a checkpoint cannot be copied to {self._rules.url}: {why}; training goes on, and it is "
                "tried again at each save"
            )
        self._failed = True


def _serve(directory: Path, rules: CheckpointConfig, number: int, pipe: Connection) -> None:
    os.nice(NICE)
    try:
        begin: Begin = pipe.recv()
        copies: Copies | None = None
        while True:
            seen: int = pipe.recv()
            try:
                copies = copies or _copies(directory, rules, begin)
                while (name := copies.copy_one()) is not None:
                    pipe.send(Said(copied=name))
                pipe.send(Said(seen=seen))
            except Exception as error:  # whatever a store's package raises: the run goes on without a copy
                kind = "" if isinstance(error, OSError | PolyrankError) else f"{type(error).__name__}: "
                pipe.send(Said(why=f"{kind}{scrub(' '.join(str(error).split()))[:500]}", seen=seen))
    except (EOFError, OSError):
        return  # the rank has ended


def _copies(directory: Path, rules: CheckpointConfig, begin: Begin) -> Copies:
    assert rules.remote.url is not None
    write_note(directory, Note(begin.run))  # what an earlier process was copying may go
    folder, pace = Folder.of(rules.remote.url, rules.remote.timeout_s), Pace(rules.remote.bytes_per_s)
    return Copies(folder, directory, rules, *begin, pace)
