"""Distributed checkpoints: written beside the old one, published by a rename, loadable under any layout.

Tensors go through torch.distributed.checkpoint with their global shapes, so a checkpoint does not know the
layout it was written under. Everything else is JSON. A manifest lists every file's size and sha256.

    DIR/step-000120/            published; `.metadata`, `__R_N.distcp`, state.json, manifest.json
    DIR/step-000120.tmp/        being written; ignored and removed by the next save
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

STATE = "state.json"
MANIFEST = "manifest.json"


class BadCheckpoint(ValueError):
    """A checkpoint that is incomplete, damaged or of another model."""


def save(
    directory: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `tensors` (each rank its own shards) and the JSON `state`; every rank of the job calls this.

    The checkpoint appears under its final name only when all ranks have written; then all but the newest
    `keep` (0: all stay) are removed. Returns its path. Needs storage that all ranks see.
    """
    final = directory / f"step-{step:08d}"
    partial = final.with_suffix(".tmp")
    lead = dist.get_rank() == 0
    if lead:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        partial.mkdir()
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    dist.barrier()
    dcp.save(dict(tensors), storage_writer=FileSystemWriter(partial, sync_files=True))
    dist.barrier()
    if lead:
        _write_manifest(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(directory)
        for old in published(directory)[:-keep] if keep else ():
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint at `path`, whatever layout wrote it; returns its state.

    Raises BadCheckpoint, naming the keys, where the model has others or other shapes than the checkpoint.
    """
    reader = SafeReader(path)
    stored = {name: tuple(entry.size) for name, entry in reader.tensors().items()}
    check_fits(path, stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    dcp.load(dict(tensors), storage_reader=reader)
    return read_state(path)


def check_fits(
    path: Path, stored: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise BadCheckpoint where a model needs other tensors, or other shapes, than the checkpoint at `path`
    has; what it has beside them is left."""
    missing, unknown = sorted(needed.keys() - stored.keys()), sorted(stored.keys() - needed.keys())
    if missing:
        raise BadCheckpoint(
            f"{path} lacks {len(missing)} tensors of this model, first {missing[0]}; it has "
            f"{len(unknown)} others{', first ' + unknown[0] if unknown else ''}"
        )
    for name, shape in needed.items():
        if stored[name] != shape:
            raise BadCheckpoint(f"{path}: {name} has shape {stored[name]}, this model needs {shape}")


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    try:
        return json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} has no readable {STATE}: {error}") from error


def published(directory: Path) -> list[Path]:
    """Complete checkpoints below `directory`, oldest first."""
    found = [p for p in directory.glob("step-*") if p.suffix != ".tmp" and (p / MANIFEST).exists()]
    return sorted(found, key=lambda p: p.name)


def verify(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty when all is as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is missing or unreadable: {error}"]
    out = []
    for name, entry in manifest.items():
        file = path / name
        if not file.exists():
            out.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            out.append(f"{name} has {file.stat().st_size} bytes, {entry['bytes']} were written")
        elif _sha256(file) != entry["sha256"]:
            out.append(f"{name} differs from what was written (sha256)")
    return out


def describe(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Global shape and dtype of every tensor of a checkpoint; reads no tensor data."""
    stored = SafeReader(path).tensors()
    return {k: (tuple(m.size), m.properties.dtype) for k, m in stored.items()}


class SafeReader(FileSystemReader):
    """Reads checkpoint metadata through an unpickler that admits only torch's own metadata classes."""

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """What is known of every tensor without reading it."""
        entries = self.read_metadata().state_dict_metadata
        return {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError) as error:
            raise BadCheckpoint(f"{file} is missing or unreadable: {error}") from error
        for name, entry in metadata.state_dict_metadata.items():
            # Anything but a tensor would be unpickled freely by torch's loader.
            if not isinstance(entry, TensorStorageMetadata):
                raise BadCheckpoint(f"{file}: {name} is not a tensor; refusing to unpickle it")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise BadCheckpoint(f"{file} points outside its folder: {info.relative_path}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED or ((module, None) in _ALLOWED and "." not in name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refusing to load {module}.{name}")


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    target = folder / MANIFEST
    with target.open("w") as f:
        json.dump(manifest, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
