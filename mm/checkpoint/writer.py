"""A process that writes a rank's share of a checkpoint, so that training goes on meanwhile.

A thread would hold the interpreter's lock for as long as it packs tensors, and keep kernels from being
launched. The process shares memory with its rank, which copies its tensors there and may then change them. It
sends no message of the job and uses no device. It is forked by a nursery (mm/ranks/nursery.py), which ends it
when the rank has ended, so a rank that is killed leaves no writer behind.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import IntEnum
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mm.checkpoint.finite import first_of, not_finite
from mm.checkpoint.room import room
from mm.checkpoint.state import Given
from mm.errors import PolyrankError
from mm.ranks.nursery import Nursery
from parallel import checkpoint as store

ALIGN = 64  # bytes; where tensors begin in the memory
NICE = 10  # where cores are few, training comes first
HEARTBEAT_S = 1.0  # least time between two signs of life
Place = tuple[int, tuple[int, ...], torch.dtype]  # first byte, shape, dtype


class Status(IntEnum):
    """What a writer is doing, as a number that ranks tell each other."""

    IDLE = 0
    WRITING = 1
    FAILED = 2
    NOT_FINITE = 3  # what it was to write


Describe = Callable[[Given], Mapping[str, Any]]
Said = tuple[Status, str]  # what a writer tells its rank: WRITING is a sign of life


def places_of(tensors: Sequence[Tensor]) -> tuple[list[Place], int]:
    """Where each tensor lies in the memory, and how many bytes it has."""
    places, at = list[Place](), 0
    for tensor in tensors:
        places.append((at, tuple(tensor.shape), tensor.dtype))
        at += -(-tensor.nbytes // ALIGN) * ALIGN
    return places, at


def views_of(memory: mmap.mmap | None, places: Sequence[Place]) -> list[Tensor]:
    """The tensors of a memory; None where they have no element."""
    out = []
    for at, shape, dtype in places:
        if memory is None or not math.prod(shape):
            out.append(torch.empty(shape, dtype=dtype))
        else:
            flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=at)
            out.append(flat.view(shape))
    return out


class Writer:
    """Writes the shares of one rank, one checkpoint at a time, in a process of its own.

    directory: of the run. describe: makes the state, on rank 0. stay: which checkpoints stay once another is
    published. also: writes, on rank 0, what lies next to it. All may rely on what is there when the writer
    is made. silent_s: how long the process may give no sign of life.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        describe: Describe,
        stay: store.Stay,
        also: Callable[[], object],
        silent_s: float,
    ) -> None:
        self._nursery = Nursery(partial(_serve, directory, describe, stay, also), rank)
        self._rank, self._silent_s = rank, silent_s
        self._pid, self._pipe = self._nursery.start(0)
        self._plan: tuple[store.Share, list[Place], Collection[str], int] | None = None
        self.status, self.why = Status.IDLE, ""
        self._heard = 0.0

    def prepare(self, share: store.Share, items: Sequence[Tensor], masks: Collection[str]) -> list[Tensor]:
        """Make the memory for the items of a share; returns the tensors in it that they are copied to.

        masks: names of those that may hold infinities.
        """
        places, size = places_of(items)
        memory, file = None, os.memfd_create("checkpoint")
        if size:
            os.ftruncate(file, size)
            memory = mmap.mmap(file, size)
            memory.write(bytes(size))  # takes its pages now, not at the first save
        self._plan = share, places, frozenset(masks), file
        self._introduce()
        return views_of(memory, places)

    def _introduce(self) -> None:
        assert self._plan is not None
        share, places, masks, file = self._plan
        with contextlib.suppress(OSError):  # it has ended: begin() finds that too, and tells how
            self._pipe.send((share, places, masks))
            send_handle(self._pipe, file, self._pid)

    def begin(self, given: Given) -> None:
        """Have the checkpoint of a step written, of what lies in the memory now."""
        self.status, self.why, self._heard = Status.WRITING, "", time.monotonic()
        try:
            self._pipe.send(given)
        except OSError:
            self._failed(self._ending())

    def poll(self, seconds: float = 0.0) -> Status:
        """What it is doing; waits up to `seconds` for it to end."""
        deadline = time.monotonic() + seconds
        while self.status is Status.WRITING:
            try:
                if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    break
                self.status, self.why = self._pipe.recv()
            except (EOFError, OSError):
                self._failed(self._ending())
                break
            self._heard = time.monotonic()
        if self.status is Status.WRITING and time.monotonic() - self._heard > self._silent_s:
            self._failed(f"nothing has been written for {self._silent_s:g} s (run.timeout_s)")
        return self.status

    def _failed(self, why: str) -> None:
        self.status, self.why = Status.FAILED, why

    def _ending(self) -> str:
        code = self._nursery.reap(self._pid)
        self._pid = 0
        memory = ": the machine may have run out of memory" if code == -9 else ""
        return f"the process that writes has ended with exit code {code}{memory}"

    def cancel(self) -> None:
        """End what is being written, and be ready for another."""
        if self._pid:
            self._nursery.reap(self._pid)
        self._pipe.close()
        self._pid, self._pipe = self._nursery.start(0)
        self.status = Status.IDLE
        self._introduce()

    def close(self) -> None:
        """End the process, with whatever it is writing."""
        self._pipe.close()
        self._nursery.close()
        if self._plan is not None:
            os.close(self._plan[-1])


def _serve(
    directory: Path,
    describe: Describe,
    stay: store.Stay,
    also: Callable[[], object],
    number: int,
    pipe: Connection,
) -> None:
    last = 0.0
    os.nice(NICE)

    def say(status: Status, why: str = "") -> None:
        said: Said = status, why
        pipe.send(said)

    def heartbeat() -> None:
        nonlocal last
        if time.monotonic() - last > HEARTBEAT_S:
            last = time.monotonic()
            say(Status.WRITING)

    try:
        share, places, masks = pipe.recv()
        file = recv_handle(pipe)
        size = os.fstat(file).st_size
        items = views_of(mmap.mmap(file, size) if size else None, places)
        while True:
            given: Given = pipe.recv()
            wrong = list[str]()
            for pair in zip(share.names, items, strict=True):
                wrong += not_finite([pair], masks)
                heartbeat()
            if wrong:
                say(Status.NOT_FINITE, first_of(wrong))
                continue
            try:
                store.write_share(share, items, directory, given.step, heartbeat)
                if share.rank == 0:
                    store.publish_shares(share, directory, given.step, describe(given), stay, heartbeat)
                    also()
                say(Status.IDLE)
            except (OSError, ValueError, CheckpointException, PolyrankError) as error:
                say(Status.FAILED, f"{store.first_cause(error)} ({room(directory)})")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the rank has ended
