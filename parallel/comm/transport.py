"""How the messages of one hop travel: rows of x to the peers of `sends`, rows of `out` from those of `recvs`.

Each start_* starts all messages at once and returns a function that completes them.

Rows of a peer that are consecutive are sent from, and received into, the tensor itself without a copy.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.waiting import wait_for
from parallel.sequence.host import Indices
from parallel.sequence.intervals import NONE, Rows, count

T = TypeVar("T")
Finish = Callable[[], None]


class Message(NamedTuple):
    """Rows that go to, or come from, one peer. rows: local rows of the tensor that is sent from or received
    into."""

    peer: int
    rows: Rows


Messages = Sequence[Message]  # one a peer


@dataclass(frozen=True)
class Channel:
    """Where a transfer runs.

    name: what errors call it.
    group: the process group of its messages.
    timeout_s: the longest wait, in seconds.
    indices: the plan's row numbers on the device.
    """

    name: str
    group: dist.ProcessGroup
    timeout_s: float
    indices: Indices = field(default_factory=Indices, repr=False)

    def call(self, peers: list[int], call: Callable[[], T]) -> T:
        """call(). Where it fails, RuntimeError names the edge, the direction and `peers`."""
        try:
            return call()
        except RuntimeError as error:
            head, *others = [f"rank {p}" for p in dict.fromkeys(peers)]
            more = f" (or from {', '.join(others)})" if others else ""
            raise RuntimeError(
                f"{self.name}: no answer from {head}{more} within {self.timeout_s:g} s; "
                f"it has ended, or is busy with other work ({str(error).splitlines()[0]})"
            ) from error


def tag_of(name: str) -> int:
    """The tag of a hop's messages. It keeps hops apart that are under way between the same two ranks."""
    return zlib.crc32(name.encode()) >> 1


def start_p2p(channel: Channel, sends: Messages, recvs: Messages, x: Tensor, out: Tensor, tag: int) -> Finish:
    """One message for each peer, of exactly its rows. tag: of tag_of()."""
    ops, landing, peers = [], [], []
    # Receives first: what arrives then goes straight to its buffer.
    for peer, rows in recvs:
        buffer = out[rows] if isinstance(rows, slice) else out.new_empty((len(rows), *out.shape[1:]))
        landing.append((rows, buffer))
        ops.append(dist.P2POp(dist.irecv, buffer, peer, channel.group, tag))
        peers.append(peer)
    for peer, rows in sends:
        ops.append(dist.P2POp(dist.isend, pick(x, rows, channel.indices), peer, channel.group, tag))
        peers.append(peer)
    works = channel.call(peers, lambda: dist.batch_isend_irecv(ops)) if ops else []
    # gloo has one handle a message, in order; other backends may have one for the batch.
    single = len(works) == len(peers)

    def finish() -> None:
        deadline = time.monotonic() + channel.timeout_s
        for i, work in enumerate(works):
            left = deadline - time.monotonic()
            waiting = peers[i : i + 1] if single else peers
            channel.call(waiting, partial(wait_for, work, x.device, left))
            if single and i < len(landing):
                unpack(*landing[i])  # while others are still on their way
        if not single:
            for rows, buffer in landing:
                unpack(rows, buffer)
        ops.clear()  # frees the messages' memory, which had to stay until here

    def unpack(rows: Rows, buffer: Tensor) -> None:
        if not isinstance(rows, slice):
            put(out, rows, buffer, channel.indices)

    return finish


def start_all_to_all(
    channel: Channel, sends: Messages, recvs: Messages, x: Tensor, out: Tensor, tag: int
) -> Finish:
    """One collective with uneven splits, in which every rank of the group takes part.

    Collectives have no tag: all ranks must start them in the same order.
    """
    ranks = dist.get_process_group_ranks(channel.group)
    to, of = dict(sends), dict(recvs)
    out_rows, in_rows = [of.get(r, NONE) for r in ranks], [to.get(r, NONE) for r in ranks]
    indices = channel.indices
    packed, arriving = pick(x, indices.joined(in_rows), indices), indices.joined(out_rows)
    splits_in, splits_out = [count(rows) for rows in in_rows], [count(rows) for rows in out_rows]
    landed = out[arriving] if isinstance(arriving, slice) else out.new_empty((len(arriving), *out.shape[1:]))
    work = channel.call(
        ranks,
        lambda: dist.all_to_all_single(
            landed, packed, splits_out, splits_in, group=channel.group, async_op=True
        ),
    )

    def finish() -> None:
        others = [r for r in ranks if r != dist.get_rank()]
        channel.call(others, partial(wait_for, work, x.device, channel.timeout_s))
        if not isinstance(arriving, slice):
            put(out, arriving, landed, indices)

    return finish


def pick(x: Tensor, rows: Rows, indices: Indices) -> Tensor:
    """Rows of x: a view where they are consecutive, else one indexed copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, indices.on(rows, x.device))


def put(out: Tensor, rows: Rows, values: Tensor, indices: Indices) -> None:
    """Write `values` to rows of out."""
    if not isinstance(rows, slice):
        out.index_copy_(0, indices.on(rows, out.device), values)
    elif rows.stop > rows.start:
        out[rows].copy_(values)


def move(out: Tensor, to: Rows, x: Tensor, rows: Rows, indices: Indices) -> None:
    """Copy rows of x to rows of out, in one pass where either side is consecutive."""
    if isinstance(to, slice) and not isinstance(rows, slice):
        torch.index_select(x, 0, indices.on(rows, x.device), out=out[to])
    else:
        put(out, to, pick(x, rows, indices), indices)
