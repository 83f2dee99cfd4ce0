"""What a virtual rank records: plain data, in the order in which it happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# By (name, ranks) of a group, in the order of its calls: what a rank gave.
Exchanged = Mapping[tuple[str, tuple[int, ...]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Call:
    """One collective, send or receive.

    op: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, barrier, send or recv, ...
    group: names of its process group, as parallel.topology.groups writes them.
    members: global ranks of the group, in its order; of a message the sender and the receiver.
    bytes: of the largest tensor that it is given, on this rank. dtype: of that tensor.
    crosses_nodes: whether `members` are on several machines.
    communicator: the group's own name; equal groups of one job have equal names on all ranks.
    peer: the other global rank of a message, None for a collective.
    sends, receives: bytes to and from each member of an all-to-all with splits, else empty.
    during: the action of the schedule that it is part of; "update" after the last.
    posted: whether the computation goes on before it is done (async_op).
    tag: of a message. batch: equal for messages that batch_isend_irecv() starts together, else None.
    at: its place among all calls and waits of the rank.
    """

    op: str
    group: str
    members: tuple[int, ...]
    bytes: int
    dtype: str
    crosses_nodes: bool
    communicator: str
    peer: int | None
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    during: str
    posted: bool
    tag: int
    batch: int | None
    at: int


@dataclass(frozen=True)
class HostWait:
    """A place in the code where the host waits for the device, and how often it did.

    file: from the folder that the packages are in. why: "read" of a value, "shape" that depends on values,
        or "copy" between host and device. phase: data, step or update.
    """

    file: str
    line: int
    count: int
    why: str
    phase: str


@dataclass(frozen=True)
class Kernel:
    """All calls of one operation with the same shapes.

    flops: of one call, a multiply and an add as two; 0 where it has no products. bytes: read and written by
        one call.
    """

    module: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    count: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Live:
    """Storages that were live at the peak and have all this in common.

    made_by: the operation that made them, at `where` (file:line), during the action `during`.
    """

    kind: str
    module: str
    made_by: str
    where: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Memory:
    """The memory of the device at its peak, in bytes of storages. by_kind and by_module each add up to it.

    during: the action in which the peak is.
    """

    peak: int
    by_kind: Mapping[str, int]
    by_module: Mapping[str, int]
    during: str
    live: tuple[Live, ...]


class Part(NamedTuple):
    """A weight in a message that sums gradients.

    rows: of the dim that data ranks split. row_bytes: of one row of its gradient. split_over: label of the
    communicator over whose ranks it is split, "" where every rank has it whole.
    """

    rows: int
    row_bytes: int
    split_over: str


@dataclass(frozen=True)
class Trace:
    """One step of one rank."""

    rank: int
    world: int
    memory: Memory
    calls: tuple[Call, ...]
    waits: tuple[tuple[int, int], ...]  # (place among calls and waits, index of the call that it waits for)
    kernels: tuple[Kernel, ...]
    host_waits: tuple[HostWait, ...]
    groups: Mapping[str, tuple[int, ...]]  # by communicator, its global ranks in order
    exchanged: Exchanged  # integers with values that collectives were given
    sums: Mapping[str, tuple[tuple[Part, ...], ...]]  # by label of a communicator, what the update sums there
    notes: tuple[str, ...] = ()  # what stands in for what

    @property
    def flops_by_module(self) -> dict[str, int]:
        """FLOPs of this rank."""
        out: dict[str, int] = {}
        for k in self.kernels:
            out[k.module] = out.get(k.module, 0) + k.flops * k.count
        return out
