"""Reads the metadata of torch.distributed.checkpoint, which are a pickle, without running code from it.

The pickle may name only the classes listed here. Each of them is replaced by a plain record class, made for
this one reading, that stores the arguments and state it is given, so unpickling calls nothing of torch. The
records are then checked, and torch's own objects are built from the names and numbers in them.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from parallel.checkpoint import manifest
from parallel.checkpoint.manifest import BadCheckpoint
from parallel.checkpoint.plain import why_not_plain

METADATA = ".metadata"
_TORCH = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_RECORDS = {
    (_TORCH, "Metadata"),
    (_TORCH, "TensorStorageMetadata"),
    (_TORCH, "BytesStorageMetadata"),
    (_TORCH, "ChunkStorageMetadata"),
    (_TORCH, "TensorProperties"),
    (_TORCH, "MetadataIndex"),
    (_TORCH, "StorageMeta"),
    (_TORCH, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    # The folder that the checkpoint was written to. Python 3.13 names the class differently.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_VALUES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
}
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class SafeReader(FileSystemReader):
    """Reads a checkpoint's tensors; of their metadata it unpickles nothing but plain records.

    torch.load(weights_only=True) reads the tensors themselves, once they are seen to be plain ones
    (plain.py). The metadata are read once, however often tensors are.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._known: Metadata | None = None

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape, dtype and chunks of every tensor, by name; reads no tensor data."""
        entries = self.read_metadata().state_dict_metadata
        return {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata; raises BadCheckpoint where they hold anything but tensors in listed files."""
        if self._known is None:
            self._known = self._checked(Path(self.path))
        self._known.storage_meta = StorageMeta(load_id=self.load_id)
        return self._known

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan; raises BadCheckpoint where files hold anything but plain ones."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (Path(self.path) / name).open("rb") as file:
                for item in items:
                    where = self.storage_data[item.storage_index]
                    if why := why_not_plain(file, where.offset, where.length):
                        tensor = item.storage_index.fqn
                        raise BadCheckpoint(f"{tensor} in {name} is no plain tensor: {why}")
        return super().read_data(plan, planner)

    def _checked(self, folder: Path) -> Metadata:
        content = manifest.read(folder, METADATA)
        listed = manifest.entries(folder)
        try:
            metadata = _Reading().load(content)
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{folder / METADATA}: {error}") from None
        except Exception as error:  # a damaged or hostile pickle can raise anything
            raise BadCheckpoint(f"{folder / METADATA} is unreadable: {error}") from error
        ends = dict.fromkeys((name for name in listed if name.endswith(".distcp")), 0)
        for info in metadata.storage_data.values():
            if info.relative_path not in listed:
                raise BadCheckpoint(
                    f"{folder / METADATA} names {info.relative_path!r}, no listed file of this folder"
                )
            if info.offset + info.length > listed[info.relative_path].bytes:
                raise BadCheckpoint(f"{folder / METADATA} reads beyond the end of {info.relative_path}")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            found = listed[name].bytes
            if found != end:
                raise BadCheckpoint(f"{folder / name} has {found} bytes, its tensors end at {end}")
        return metadata


class _Record:
    """Stands in for an unpickled object: stores its constructor's arguments and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reading:
    """One reading of one pickle. It owns the record classes, so changes to them end with the reading."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], type[_Record]] = {
            key: type(key[1], (_Record,), {}) for key in _RECORDS
        }

    def load(self, content: bytes) -> Metadata:
        top = _Unpickler(io.BytesIO(content), self.kinds).load()
        fields = self._fields(top, "Metadata")
        tensors, storage = fields["state_dict_metadata"], fields["storage_data"]
        if type(tensors) is not dict or type(storage) is not dict:
            _refuse("a mapping of tensors", fields)
        stored = {self._index(k): self._storage_info(v) for k, v in storage.items()}
        out = {_text(name): self._tensor(name, value) for name, value in tensors.items()}
        for name, tensor in out.items():
            for chunk in tensor.chunks:
                where = stored.get(MetadataIndex(name, chunk.offsets))
                if where is None:
                    raise BadCheckpoint(f"{name}: a part at {list(chunk.offsets)} is nowhere")
                if where.length < math.prod(chunk.sizes) * tensor.properties.dtype.itemsize:
                    raise BadCheckpoint(
                        f"{name}: a part of {list(chunk.sizes)} does not lie in {where.length} bytes"
                    )
        return Metadata(state_dict_metadata=dict(out), storage_data=stored)

    def _fields(self, value: Any, name: str) -> dict[str, Any]:
        """The fields of a record of the class `name`; raises BadCheckpoint for any other value."""
        kind = self.kinds[_FILES if name == "_StorageInfo" else _TORCH, name]
        if type(value) is not kind or type(value.state) is not dict:
            _refuse(f"a {name}", value)
        return value.state

    def _tensor(self, name: str, value: Any) -> TensorStorageMetadata:
        if type(value) is not self.kinds[_TORCH, "TensorStorageMetadata"]:
            raise BadCheckpoint(f"{name} is not a tensor; refusing to unpickle it")
        fields = self._fields(value, "TensorStorageMetadata")
        properties = fields["properties"]
        if type(properties) is not self.kinds[_TORCH, "TensorProperties"]:
            _refuse("TensorProperties", properties)
        # The state of TensorProperties is a tuple, dtype first (its __getstate__).
        dtype = properties.state[0]
        if not isinstance(dtype, torch.dtype):
            _refuse("a dtype", dtype)
        size, chunks = _shape(fields["size"]), []
        for chunk in fields["chunks"]:
            parts = self._fields(chunk, "ChunkStorageMetadata")
            at, lengths = _shape(parts["offsets"]), _shape(parts["sizes"])
            if not len(at) == len(lengths) == len(size) or any(
                a + n > s for a, n, s in zip(at, lengths, size, strict=True)
            ):
                raise BadCheckpoint(f"{name}: a part at {list(at)} does not lie inside {list(size)}")
            chunks.append(ChunkStorageMetadata(at, lengths))
        if sum(math.prod(c.sizes) for c in chunks) != math.prod(size):
            raise BadCheckpoint(f"{name}: its parts do not make up {list(size)}")
        return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)

    def _index(self, value: Any) -> MetadataIndex:
        fields = self._fields(value, "MetadataIndex")
        hint, offset = fields.get("index"), fields.get("offset")
        return MetadataIndex(
            _text(fields["fqn"]),
            None if offset is None else _shape(offset),
            None if hint is None else _count(hint),
        )

    def _storage_info(self, value: Any) -> _StorageInfo:
        fields = self._fields(value, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise BadCheckpoint("its tensors are transformed; needed: plain ones")
        return _StorageInfo(
            _text(fields["relative_path"]), _count(fields["offset"]), _count(fields["length"])
        )


class _Unpickler(pickle._Unpickler):
    """Makes records, tuples, strings and dtypes; refuses every other class.

    It is the one in Python: that in C makes room for as many objects as a file says, up to tens of GB.
    """

    def __init__(self, file: io.BytesIO, kinds: dict[tuple[str, str], type[_Record]]) -> None:
        super().__init__(file)
        self._kinds = kinds

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._kinds:
            return self._kinds[key]
        if key in _VALUES:
            return _VALUES[key]
        if module == "torch" and f"torch.{name}" in _DTYPES:
            return _DTYPES[f"torch.{name}"]
        raise BadCheckpoint(f"refusing to load {module}.{name}")


def _text(value: Any) -> str:
    return value if type(value) is str else _refuse("text", value)


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else _refuse("a count", value)


def _shape(value: Any) -> torch.Size:
    return torch.Size(map(_count, value)) if type(value) is tuple else _refuse("a shape", value)


def _refuse(what: str, value: Any) -> NoReturn:
    raise BadCheckpoint(f"{what} is expected, found a value of type {type(value).__name__}")
