"""Distributed checkpoints: written to a temporary folder, published by a rename, loadable in any layout.

torch.distributed.checkpoint stores tensors by their global shapes, so a checkpoint does not depend on the
layout that wrote it. Everything else is JSON. A manifest lists the size and sha256 of every file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from parallel.checkpoint import manifest
from parallel.checkpoint.folder import (
    FORMAT,
    STATE,
    check_there,
    newest,
    partial_of,
    publish,
    remove_leftovers,
    write_state,
)
from parallel.checkpoint.lazy import Lazy, LazyPlanner
from parallel.checkpoint.manifest import BadCheckpoint
from parallel.checkpoint.metadata import SafeReader
from parallel.sharding.optim import RULES

_KEPT = [[rule] for rule in RULES]  # where a name goes on so, it is of an optimizer
NAMED = 5  # tensors that a message names, of each kind of difference


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor] | Lazy,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of step `step` below `directory` and return its path; collective over the job.

    tensors: by name. Each rank writes its own shards of a DTensor; plain tensors are equal on all ranks that
        pass them. Lazy: of a job of one process, made as they are written.
    state: anything that JSON holds.
    keep: how many of the newest checkpoints stay; 0 keeps all.

    The checkpoint gets its final name only after all ranks have written. Needs storage that all ranks share.
    """
    partial = partial_of(directory, step)
    lead = dist.get_rank() == 0
    if lead:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        partial.mkdir()
        write_state(partial, step, state)
    dist.barrier()
    writer = FileSystemWriter(partial, sync_files=True)
    if isinstance(tensors, Lazy):
        save_shards(tensors.stand_ins(), storage_writer=writer, planner=LazyPlanner(tensors))
    else:
        save_shards(dict(tensors), storage_writer=writer)
    sums = _gather_sums(partial)
    if lead:
        publish(partial, sums, newest(keep))
    dist.barrier()
    return partial.with_suffix("")


def _gather_sums(folder: Path) -> dict[str, manifest.Entry]:
    """The manifest entries of all files. Each rank sums the shards it wrote, rank 0 all other files too."""
    rank, world = dist.get_rank(), dist.get_world_size()
    written = {name: re.match(r"__(\d+)_\d+\.distcp$", name) for name in manifest.names(folder)}
    mine = [n for n, m in written.items() if (int(m[1]) == rank if m else rank == 0)]
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, {n: manifest.entry_of(folder / n) for n in mine})
    return {name: entry for part in parts for name, entry in part.items()}


def load(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path`, whatever layout wrote it; return its state.

    This does not check the sums of the tensors' files: call verify() first. Raises BadCheckpoint where a file
    cannot be read, and where the checkpoint lacks a tensor or has another shape for it.
    """
    fill(SafeReader(path), tensors)
    return read_state(path)


def fill(reader: SafeReader, tensors: Mapping[str, Tensor]) -> None:
    """load() from a reader, without the state."""
    path = Path(reader.path)
    stored = {name: tuple(entry.size) for name, entry in reader.tensors().items()}
    check_fits(path, stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    try:
        load_shards(dict(tensors), storage_reader=reader)
    except CheckpointException as error:  # a BaseException, which callers would not catch
        raise BadCheckpoint(f"{path} cannot be read: {first_cause(error)}") from error


def check_fits(
    path: Path | str, stored: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise BadCheckpoint where the checkpoint at `path` lacks a tensor or has another shape for it.

    path: or words for what there is in the place of a checkpoint.
    stored, needed: global shapes by name, of the checkpoint and of the model. More stored tensors than needed
        are fine.
    """
    missing = sorted(needed.keys() - stored.keys())
    # Weights first: of what an optimizer keeps nobody sees which model it is of.
    unknown = sorted(stored.keys() - needed.keys(), key=lambda name: (name.split(".")[1:2] in _KEPT, name))
    other = [
        f"{name} has shape {stored[name]}, this model needs {shape}"
        for name, shape in needed.items()
        if stored.get(name, shape) != shape
    ]
    wrong = []
    if missing:
        wrong.append(f"lacks {len(missing)} tensors of this model, first {_some(missing)}")
        wrong.append(f"it has {len(unknown)} others{', first ' + _some(unknown) if unknown else ''}")
    if other:
        wrong.append(f"{len(other)} tensors have another shape: {_some(other)}")
    if wrong:
        raise BadCheckpoint(f"{path} does not fit: {'; '.join(wrong)}")


def _some(lines: Sequence[str]) -> str:
    return ", ".join(lines[:NAMED]) + (", .." if len(lines) > NAMED else "")


def first_cause(error: BaseException) -> str:
    """The first cause of a failed save or load, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split())


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; raises BadCheckpoint where it is damaged or names no step."""
    content = manifest.read(path, STATE)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} has no readable {STATE}: {error}") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise BadCheckpoint(f"{path}: {STATE} does not say after which step it was written")
    found = state.get("format", FORMAT)
    if type(found) is not int or found > FORMAT:
        raise BadCheckpoint(
            f"{path} has format {found!r}, and this version reads up to {FORMAT}; needed: the version that "
            "wrote it"
        )
    return state


def sound_state(path: Path, check: Callable[[Path], list[str]] = manifest.verify) -> dict[str, Any]:
    """read_state() of a checkpoint that `check` (verify, or structure, which is quick) finds nothing in.

    Raises BadCheckpoint for any other.
    """
    check_there(path)
    wrong = manifest.structure(path)
    if not wrong:
        # These compare sizes with what is in the files, before all of them are summed.
        described(SafeReader(path)), read_state(path)
        wrong = check(path)
    if wrong:
        raise BadCheckpoint(f"it is damaged: {'; '.join(wrong)}")
    return read_state(path)


def describe(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(global shape, dtype) of every tensor of a checkpoint, by name; reads no tensor data."""
    return described(SafeReader(path))


def described(reader: SafeReader) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """describe() of a reader."""
    return {k: (tuple(m.size), m.properties.dtype) for k, m in reader.tensors().items()}
