"""A table as a file of numpy arrays, one after another, mapped into memory when it is read.

The first array is the sha256 of the second as it stands in the file. That is JSON: what holds for the table,
the names of the arrays that follow, the bytes that they take and their sha256. A file of up to CHECKED bytes
is checked as a whole when it is opened. Of a larger one, whose pages are read when they are needed, JSON and
length are checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.columns.table import Array, Spec, Strings, Table

CHECKED = 64 << 20  # bytes
ALIGNED = 64  # bytes, as numpy aligns the data of its own files
LONGEST_HEAD = 4096  # bytes of the description before an array

Bytes = bytes | memoryview


def content_of(table: Table) -> list[Bytes]:
    """A table as the bytes of its file, without copies of columns."""
    body: list[Bytes] = []
    names = []
    for name, array in _arrays(table):
        names.append(name)
        body += _array_bytes(array)
    said = {
        **table.header,
        "spec": table.spec.name,
        "arrays": names,
        "bytes": sum(len(part) for part in body),
        "sha256": _sum(body),
    }
    text = _byte_array(json.dumps(said, separators=(",", ":")).encode())
    return [*_byte_array(hashlib.sha256(b"".join(text)).digest()), *text, *body]


def write_file(path: Path, content: list[Bytes]) -> bool:
    """Write a file, whole or not at all; False where the folder cannot be written."""
    # Ranks on several machines may write at the same time: the rename is atomic.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("wb") as file:
            for part in content:
                file.write(part)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return False
    return True


def read_file(path: Path, spec: Spec) -> Table | None:
    """The table of a file, mapped; None where it is damaged or of another spec.

    Raises FileNotFoundError where it is gone.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _table(mapped, spec)
    except FileNotFoundError:
        raise
    except Exception:  # whatever a damaged description of an array leads to
        return None


def forget_pages(table: Table) -> None:
    """Take the pages of a mapped table out of this process's memory; they stay in the machine's cache."""
    mapped = table.columns["shards"].base
    while isinstance(mapped, np.ndarray):
        mapped = mapped.base
    if isinstance(mapped, memoryview):
        mapped = mapped.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _arrays(table: Table) -> Iterator[tuple[str, Array]]:
    for name in table.spec.columns:
        yield name, table.columns[name]
        yield f"{name}.first", table.first[name]
    for name in table.spec.dictionaries:
        yield f"{name}.data", table.strings[name].data
        yield f"{name}.ends", table.strings[name].ends


def _array_bytes(array: Array) -> list[Bytes]:
    """An array as numpy's own format has it, and zeros up to the next multiple of ALIGNED."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    data: Bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
    return [head.getvalue(), data, bytes(-(head.tell() + len(data)) % ALIGNED)]


def _byte_array(data: bytes) -> list[Bytes]:
    return _array_bytes(np.frombuffer(data, dtype=np.uint8))


def _sum(parts: list[Bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _table(mapped: mmap.mmap, spec: Spec) -> Table:
    _, begin = _array_at(mapped, 0)
    text, at = _array_at(mapped, begin)
    if mapped[:begin] != b"".join(_byte_array(hashlib.sha256(mapped[begin:at]).digest())):
        raise ValueError("its header is damaged")
    said: dict[str, Any] = json.loads(text.tobytes())
    if said.pop("spec") != spec.name or said.pop("bytes") != len(mapped) - at:
        raise ValueError("it is of another kind, or not whole")
    names, digest = said.pop("arrays"), said.pop("sha256")
    if len(mapped) <= CHECKED and _sum([memoryview(mapped)[at:]]) != digest:
        raise ValueError("it is damaged")
    found: dict[str, Array] = {}
    for name in names:
        found[name], at = _array_at(mapped, at)
    for name, dtype in spec.columns.items():
        if found[name].dtype != dtype:
            raise ValueError(f"its column {name} is {found[name].dtype}")
    return Table(
        spec,
        columns={name: found[name] for name in spec.columns},
        first={name: found[f"{name}.first"] for name in spec.columns},
        strings={n: Strings(found[f"{n}.data"], found[f"{n}.ends"]) for n in spec.dictionaries},
        header=said,
    )


def _array_at(mapped: mmap.mmap, at: int) -> tuple[Array, int]:
    """The array that begins at a byte, and where the next one does."""
    head = io.BytesIO(mapped[at : at + LONGEST_HEAD])
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("it is no numpy array")
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    begin, count = at + head.tell(), int(np.prod(shape))
    end = begin + count * dtype.itemsize
    if count and end > len(mapped):
        raise ValueError("it is not whole")
    array = np.frombuffer(mapped, dtype, count, begin) if count else np.empty(0, dtype)
    return array.reshape(shape), end + -end % ALIGNED
