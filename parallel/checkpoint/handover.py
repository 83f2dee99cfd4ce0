"""Tensors that pass from one layout to another in memory: slices on a rank, messages between ranks, no file.

What goes where follows the rules of a checkpoint, since torch's planners of saving and loading work it out:
a rank's shards stand in for the file that it would have written. Where a part is on several ranks, it comes
from the rank that needs it, else from one of its node, else from the next one.
"""

from __future__ import annotations

import math
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from parallel.checkpoint.distributed import check_fits
from parallel.comm.transport import Channel, Message, start_p2p, tag_of

MESSAGE_BYTES = 64 << 20  # of one message; a rank has one that it sends and one that it receives
ALIGNED = 16  # parts of a message begin at multiples of as many bytes, which suits every dtype


@dataclass(frozen=True)
class Held:
    """This rank's shards of some tensors, not copied, without the meshes and groups of their layout."""

    items: Sequence[WriteItem]
    shards: dict[MetadataIndex, Tensor]

    def free(self) -> None:
        """Give the memory of the shards back."""
        self.shards.clear()


def hold(tensors: Mapping[str, Tensor]) -> Held:
    """What this rank holds of `tensors`, by name: shards of DTensors, plain tensors whole."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    items = planner.create_local_plan().items
    shards = {item.index: planner.resolve_data(item) for item in items}
    return Held(items, {i: t.detach() for i, t in shards.items() if isinstance(t, Tensor)})


class Handover:
    """Tensors of which the ranks hold shards, to be taken in another layout.

    Every rank of the group makes one, and calls fill() alike. Errors of messages are RuntimeErrors that name
    the rank which does not answer within channel.timeout_s. A rank may wait as long as another moves all that
    it holds.

    Each rank learns of all shards of all ranks, as in the planning of a checkpoint: O(ranks x tensors).
    """

    def __init__(
        self,
        held: Held,
        channel: Channel,
        device: torch.device,
        *,
        node_size: int | None = None,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self._held, self._channel, self._device = held, channel, device
        self._message_bytes = message_bytes
        self._rank, self._world = dist.get_rank(channel.group), dist.get_world_size(channel.group)
        self._node_size = node_size or self._world
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._holders: dict[MetadataIndex, list[int]] = defaultdict(list)
        for rank, items in enumerate(self._exchange([list(held.items)] * self._world)):
            for item in items:
                self._enter(rank, item)

    def _enter(self, rank: int, item: WriteItem) -> None:
        """Take note of a shard that a rank holds."""
        data = item.tensor_data
        assert data is not None, item
        known = self._tensors.setdefault(
            item.index.fqn, TensorStorageMetadata(data.properties, data.size, chunks=[])
        )
        if math.prod(data.chunk.sizes):
            if item.index not in self._holders:
                known.chunks.append(data.chunk)
            self._holders[item.index].append(rank)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(global shape, dtype) by name."""
        return {name: (tuple(t.size), t.properties.dtype) for name, t in self._tensors.items()}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> int:
        """Fill `tensors` in place, cast to their dtypes; returns the bytes that came from other ranks.

        Beside the shards of both layouts this takes two messages of message_bytes. Raises BadCheckpoint where
        a tensor is missing or has another shape.
        """
        stored = {name: shape for name, (shape, _) in self.shapes.items()}
        check_fits("what is in memory", stored, {name: tuple(t.shape) for name, t in tensors.items()})
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), Metadata(dict(self._tensors)))
        wanted: list[list[ReadItem]] = [[] for _ in range(self._world)]
        for item in planner.create_local_plan().items:
            wanted[self._nearest(self._holders[item.storage_index])] += self._in_rows(item)
        asked = self._exchange(wanted)
        for item in wanted[self._rank]:
            planner.resolve_tensor(item).copy_(self._source(item))
        received = 0
        for to, of in self._shifts():
            coming, going = self._messages(wanted[of]), self._messages(asked[to])
            for i in range(max(len(coming), len(going))):
                ours, theirs = going[i : i + 1], coming[i : i + 1]
                size = sum(map(self._size, theirs[0])) if theirs else 0
                self._unpack(self._swap(to, of, self._pack(ours), size), theirs, planner)
                received += size
        return received

    def _shifts(self) -> Iterator[tuple[int, int]]:
        """(rank to send to, rank to receive from), every other rank once. Ranks that wait for each other are
        at the same shift, so that the one at the earliest always goes on."""
        for by in range(1, self._world):
            yield (self._rank + by) % self._world, (self._rank - by) % self._world

    def _nearest(self, holders: Sequence[int]) -> int:
        node = self._rank // self._node_size
        return min(holders, key=lambda r: (r // self._node_size != node, (r - self._rank) % self._world))

    def _in_rows(self, item: ReadItem) -> Iterator[ReadItem]:
        """An item in parts that fit a message, along dim 0; a row stays whole."""
        if not item.lengths or self._size(item) <= self._message_bytes:
            yield item
            return
        rows = max(1, self._message_bytes // self._size(replace(item, lengths=_with(item.lengths, 1))))
        for first in range(0, item.lengths[0], rows):
            yield replace(
                item,
                storage_offsets=_with(item.storage_offsets, item.storage_offsets[0] + first),
                dest_offsets=_with(item.dest_offsets, item.dest_offsets[0] + first),
                lengths=_with(item.lengths, min(rows, item.lengths[0] - first)),
            )

    def _dtype(self, item: ReadItem) -> torch.dtype:
        return self._tensors[item.storage_index.fqn].properties.dtype

    def _size(self, item: ReadItem) -> int:
        """Bytes of an item in a message."""
        size = math.prod(item.lengths) * self._dtype(item).itemsize
        return -(-size // ALIGNED) * ALIGNED

    def _messages(self, items: Sequence[ReadItem]) -> list[list[ReadItem]]:
        """Items, in order, by the message that they go in; the same at both ends."""
        out: list[list[ReadItem]] = []
        left = 0
        for item in items:
            if not out or self._size(item) > left:
                out.append([])
                left = self._message_bytes
            out[-1].append(item)
            left -= self._size(item)
        return out

    def _source(self, item: ReadItem) -> Tensor:
        """A part of a shard that is here."""
        shard = self._held.shards[item.storage_index]
        for dim, (first, n) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            shard = shard.narrow(dim, first, n)
        return shard

    def _pack(self, messages: Sequence[Sequence[ReadItem]]) -> Tensor:
        """The bytes of a message, none for none."""
        items = [item for message in messages for item in message]
        out = torch.empty(sum(map(self._size, items)), dtype=torch.uint8, device=self._device)
        for item, part in self._parts(out, items):
            part.copy_(self._source(item))
        return out

    def _unpack(
        self, data: Tensor, messages: Sequence[Sequence[ReadItem]], planner: DefaultLoadPlanner
    ) -> None:
        for item, part in self._parts(data, [item for message in messages for item in message]):
            planner.resolve_tensor(item).copy_(part)

    def _parts(self, data: Tensor, items: Sequence[ReadItem]) -> Iterator[tuple[ReadItem, Tensor]]:
        """Each item with its place in a message, as a tensor of its shape and dtype."""
        at = 0
        for item in items:
            dtype = self._dtype(item)
            used = math.prod(item.lengths) * dtype.itemsize
            yield item, data[at : at + used].view(dtype).view(item.lengths)
            at += self._size(item)

    def _swap(self, to: int, of: int, data: Tensor, size: int) -> Tensor:
        """Send `data`, bytes, to one rank, and receive `size` of them from another."""
        out = data.new_empty(size)
        sends = [Message(to, slice(0, len(data)))] if len(data) else []
        recvs = [Message(of, slice(0, size))] if size else []
        start_p2p(self._channel, sends, recvs, data, out, tag_of(self._channel.name))()
        return out

    def _exchange(self, given: Sequence[Any]) -> list[Any]:
        """given[r] goes to rank r; what each rank gives this one."""
        out = list(given)
        for to, of in self._shifts():
            text = self._bytes(pickle.dumps(given[to]))
            size = self._swap(to, of, self._bytes(np.array([len(text)]).tobytes()), 8)
            found = self._swap(to, of, text, int(size.cpu().view(torch.int64).item()))
            out[of] = pickle.loads(found.cpu().numpy().tobytes())  # what a rank of this job has written
        return out

    def _bytes(self, content: bytes) -> Tensor:
        return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).to(self._device)


def _with(dims: torch.Size, first: int) -> torch.Size:
    return torch.Size((first, *dims[1:]))
