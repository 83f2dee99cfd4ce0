"""A checkpoint of which every rank writes its share by itself, while its job does something else.

Who writes what is planned once, together. From then on ranks exchange nothing: each writes its file and a
note of it into the folder that all share, and rank 0 publishes once all notes are there. So the writing may
go on in another process, whatever messages the job sends meanwhile.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from parallel.checkpoint import manifest
from parallel.checkpoint.folder import STATE, Stay, partial_of, publish, write_state, write_synced
from parallel.checkpoint.metadata import METADATA

POLL_S = 0.02  # how often rank 0 looks for the notes of others


@dataclass(frozen=True)
class Share:
    """What one rank of `world` writes. metadata: of the whole checkpoint, on rank 0 alone."""

    rank: int
    world: int
    plan: SavePlan
    metadata: Metadata | None

    @property
    def names(self) -> list[str]:
        """By item, the tensor that it is of."""
        return [item.index.fqn for item in self.plan.items]


def plan_share(tensors: Mapping[str, Tensor]) -> tuple[Share, list[Tensor]]:
    """This rank's share of `tensors`, and its items, which share memory with them; collective over the job.

    tensors: as save() takes them. A tensor that several ranks hold is in the share of one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    plans: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(planner.create_local_plan(), plans, dst=0)
    metadata: Metadata | None = None
    if plans is not None:
        plans, metadata = planner.create_global_plan(plans)
        plans = FileSystemWriter(".").prepare_global_plan(plans)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, plans, src=0)
    plan = planner.finish_plan(mine[0])
    items = [planner.resolve_data(item) for item in plan.items]
    assert all(isinstance(item, Tensor) for item in items), "a checkpoint holds tensors, all else is JSON"
    return Share(rank, world, plan, metadata), [i.detach() for i in items if isinstance(i, Tensor)]


class _Given(DefaultSavePlanner):
    """Resolves items to the tensors given for them. heartbeat: called with each."""

    def __init__(self, share: Share, items: Sequence[Tensor], heartbeat: Callable[[], object]) -> None:
        super().__init__()
        self._items = {i.index: tensor for i, tensor in zip(share.plan.items, items, strict=True)}
        self._heartbeat = heartbeat

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor of an item."""
        self._heartbeat()
        return self._items[write_item.index]


def write_share(
    share: Share,
    items: Sequence[Tensor],
    directory: Path,
    step: int,
    heartbeat: Callable[[], object] = lambda: None,
) -> None:
    """Write a rank's file of the checkpoint of step `step`, flush it, and leave a note with its sum.

    items: on the host, in the order of plan_share(). directory: is there. heartbeat: called again and again.
    Raises OSError, and torch's CheckpointException, as the file system does.
    """
    partial = partial_of(directory, step)
    partial.mkdir(exist_ok=True)  # without its parents: a folder that was moved away is not begun anew
    # Nothing is copied ahead: this may be a fork of a process that has a device.
    writer = FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
    # Of an empty share torch would write an empty file, and not say that it has.
    results = (
        writer.write_data(share.plan, _Given(share, items, heartbeat)).wait() if share.plan.items else []
    )
    files = {r.storage_data.relative_path for r in results}
    note = {
        "files": {name: manifest.entry_of(partial / name, heartbeat) for name in sorted(files)},
        "items": [_noted(result) for result in results],
    }
    unfinished = partial / f"written-{share.rank}.tmp"
    write_synced(unfinished, json.dumps(note))
    os.replace(unfinished, _note_of(partial, share.rank))


def publish_shares(
    share: Share,
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    stay: Stay,
    heartbeat: Callable[[], object] = lambda: None,
) -> Path:
    """Wait for the notes of all ranks, on rank 0, and publish the checkpoint; returns its path.

    state: as of save(). heartbeat: called again and again, while others write too: their ranks watch them.
    """
    assert share.metadata is not None, "rank 0 publishes"
    partial = partial_of(directory, step)
    write_state(partial, step, state)
    entries: dict[str, manifest.Entry] = {}
    results: list[list[WriteResult]] = []
    for rank in range(share.world):
        note = _note_of(partial, rank)
        while not note.is_file():
            heartbeat()
            time.sleep(POLL_S)
        said = json.loads(note.read_text())
        entries |= {name: manifest.Entry(*entry) for name, entry in said["files"].items()}
        results.append([_result(item) for item in said["items"]])
        note.unlink()
    FileSystemWriter(partial, sync_files=True).finish(share.metadata, results)
    entries |= {name: manifest.entry_of(partial / name) for name in (METADATA, STATE)}
    return publish(partial, entries, stay)


def _note_of(partial: Path, rank: int) -> Path:
    return partial / f"written-{rank}.json"


def _noted(result: WriteResult) -> list[Any]:
    """Where an item has been written, as plain data."""
    index, where = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [index.fqn, offset, index.index, where.relative_path, where.offset, where.length]


def _result(said: Sequence[Any]) -> WriteResult:
    name, offset, hint, file, start, length = said
    return WriteResult(MetadataIndex(name, offset, hint), length, _StorageInfo(file, start, length))
