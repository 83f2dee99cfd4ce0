"""What of a step is read and decoded, in the rank itself or by a worker of it, with equal results.

A worker answers in JSON and leaves tensors in memory that it shares with its rank, where their batch has them
or in a tray: the rank unpickles nothing that comes from a process which decodes what others have made.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import signal
import struct
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mm.data.reader import BadSample
from mm.data.sample import Part, Sample
from mm.errors import DataError
from mm.ranks.shared import ALIGN, SharedMemory

PLACE = struct.Struct("<qq")  # where a worker is: the number of its order, and of the task in that
DONE = -1  # in place of a task: none
Texts = list[np.ndarray]  # the ids of each text of a sample, int64


@dataclass(frozen=True)
class Task:
    """An item to prepare, or the text of a sample to encode.

    module: of the item; "" for text. sample: whose it is. part: the item, or the sample's json.
    """

    module: str
    sample: Sample
    part: Part


def small(tasks: Sequence[Task]) -> list[Task]:
    """Tasks as they are sent: reading and decoding need nothing of a sample's other parts.

    Tasks of one sample share it, so that it is sent once.
    """
    samples = {id(task.sample): task.sample for task in tasks}
    # What replace() gives, in half of its time.
    bare = {key: Sample(**{**vars(sample), "segments": ()}) for key, sample in samples.items()}
    return [Task(task.module, bare[id(task.sample)], task.part) for task in tasks]


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Reads(Generic[T]):
    """What a rank reads of a micro-batch: the tasks, or what they gave.

    items: by module, of consecutive items of the rank's dp rank. first: by module, the number of the first of
    them. texts: of the samples of the rank's dp rank, or none.
    """

    items: Mapping[str, Sequence[T]]
    first: Mapping[str, int]
    texts: Sequence[T]

    @property
    def every(self) -> list[T]:
        """All of it, in one order."""
        return [*itertools.chain(*self.items.values()), *self.texts]

    def filled(self, values: Iterable[U]) -> Reads[U]:
        """The same with other values, in the order of `every`, of which as many are taken as it has."""
        given = iter(values)
        items = {m: [next(given) for _ in own] for m, own in self.items.items()}
        return Reads(items, self.first, [next(given) for _ in self.texts])


# Of a task and memory for its tensor, which it need not use (Assembler.decode); raises BadSample.
Decode = Callable[[Task, Tensor | None], Tensor | Texts]
Ahead = Callable[[Sequence[Task]], object]  # is told which tasks come next, so that they are read together
Decoded = Tensor | Texts | BadSample


def attempt(decode: Decode, task: Task, place: Tensor | None = None) -> Decoded:
    """What a task gives, or why its sample is bad. place: memory for its tensor."""
    try:
        return decode(task, place)
    except BadSample as error:
        return error


def good(found: Decoded) -> Tensor | Texts:
    """A result that is known to be none of a bad sample."""
    assert not isinstance(found, BadSample)
    return found


class Tray(NamedTuple):
    """Memory that a worker writes results to."""

    memory: mmap.mmap

    @staticmethod
    def new(size: int) -> Tray:
        """An empty tray of `size` bytes, which has no name anywhere. Pages are taken when they are used."""
        return Tray(mmap.mmap(-1, size))

    def put(self, at: int, values: np.ndarray) -> int | None:
        """Write values from byte `at` on; returns where the next may begin, None where they do not fit."""
        end = at + values.nbytes
        if end > len(self.memory):
            return None
        np.frombuffer(self.memory, values.dtype, values.size, at)[:] = values.reshape(-1)
        return -(-end // ALIGN) * ALIGN

    def filled(self, used: int) -> Tensor:
        """The first `used` bytes as they lie there, which the next results overwrite: uint8 [used]."""
        if not used:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=used)


class Order(NamedTuple):
    """Tasks that a worker does one after another, and the tray for results that have no place.

    number: counts the orders of a rank. places: by task, where its tensor belongs in the shared memory and
    how many bytes it has there (SharedMemory.place).
    """

    number: int
    tray: int
    tasks: Sequence[Task]
    places: Sequence[tuple[int, int] | None]


class Room(NamedTuple):
    """Where a worker leaves results: the memory of the batches, and trays for what has no place there."""

    memory: SharedMemory
    trays: Sequence[Tray]

    def laid(
        self, found: Decoded, tray: int, at: int, place: tuple[int, int] | None
    ) -> tuple[dict[str, Any], int | None]:
        """How the rank finds a result, and where in its tray the next one may begin; None where this one does
        not fit. place: of Order.places."""
        if isinstance(found, BadSample):
            return {"bad": found.why}, at
        if isinstance(found, Tensor):
            bits = found.reshape(-1).view(torch.uint8).numpy()  # numpy lacks some dtypes
            answer = {"shape": list(found.shape), "dtype": str(found.dtype).removeprefix("torch.")}
            if place is not None and place[1] == bits.size:
                if self.memory.place(found) != place:  # it was not decoded to there
                    self.memory.write(place[0], bits)
                return {**answer, "at": None}, at
            return {**answer, "at": at}, self.trays[tray].put(at, bits)
        ids = np.concatenate([np.empty(0, np.int64), *found])
        return {"at": at, "lengths": [len(text) for text in found]}, self.trays[tray].put(at, ids)


def work(
    pipe: Connection,
    room: Room,
    place: memoryview,
    decode: Decode,
    limit_s: float,
    ahead: Ahead = lambda tasks: None,
) -> None:
    """Carry out orders until the rank closes the pipe, or has ended.

    place: PLACE is written there before each task. limit_s: a task that takes longer ends this process, by
    the system and whatever it does: nobody may be left to kill it. ahead: is given an order's tasks first.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            order: Order = pipe.recv()  # from the rank alone
        except (EOFError, OSError):
            return
        answers: list[dict[str, Any]] = []
        at = 0
        with contextlib.suppress(DataError):  # a task meets it again, and says so
            ahead(order.tasks)
        for n, task in enumerate(order.tasks):
            PLACE.pack_into(place, 0, order.number, n)
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            try:
                own = order.places[n]
                found = attempt(decode, task, None if own is None else room.memory.bytes_at(*own))
                answer, end = room.laid(found, order.tray, at, own)
            except DataError as error:  # the store of its shard does not answer
                answer, end = {"refused": str(error)}, at
            except Exception:
                answer, end = {"failed": traceback.format_exc()}, at
            if end is None:
                break  # the rest comes again with an empty tray
            answers.append(answer)
            at = end
        signal.setitimer(signal.ITIMER_REAL, 0)
        PLACE.pack_into(place, 0, order.number, DONE)
        try:
            pipe.send_bytes(json.dumps({"used": at, "answers": answers}).encode())
        except OSError:
            return


def unpacked(answer: dict[str, Any], tray: Tensor, task: Task, place: Tensor | None = None) -> Decoded:
    """A result as the worker had it, and no longer in its tray. tray: Tray.filled(). place: for a tensor; it
    is used where shape and dtype are those of the result."""
    if "bad" in answer:
        return BadSample(task.sample, answer["bad"])
    at = answer["at"]
    if "shape" in answer:
        dtype, shape = getattr(torch, answer["dtype"]), tuple(answer["shape"])
        fits = place is not None and place.shape == shape and place.dtype == dtype
        if at is None:
            assert place is not None, "what lies in its place has one"
            return place if fits else place.reshape(-1).view(torch.uint8).view(dtype).view(shape).clone()
        end = at + dtype.itemsize * math.prod(shape)
        found = tray[at:end].view(dtype).view(shape)
        return place.copy_(found) if place is not None and fits else found.clone()
    ends = list(itertools.accumulate(answer["lengths"], initial=0))
    ids = tray[at : at + 8 * ends[-1]].view(torch.int64).numpy().copy()
    return [ids[a:b] for a, b in itertools.pairwise(ends)]
