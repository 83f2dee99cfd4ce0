"""Records of one file, by its kind: how many there are, and those from one number to another.

A worker reads the records of one shard after the other, mostly of one file: it keeps what it knows of that.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.layouts.media import kind_of
from mm.data.layouts.tar import ending, record_of
from mm.data.tar import File, read_contents, split_name
from mm.errors import DataError

LONGEST_TEXT = 64 << 20  # bytes of a part of a tar that is taken for text


@dataclass(frozen=True)
class Record:
    """One record, before any layout has read it.

    where: for messages. payloads: that come with it, by name. parts: of a tar, all its parts.
    """

    where: str
    value: Any
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    parts: Mapping[str, bytes] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of file: its number of records, and records [start, stop). Both may raise DataError."""

    count: Callable[[Path], int]
    read: Callable[[Path, int, int], Iterator[Record]]


class Unreadable(ValueError):
    """A record that cannot be read at all."""


def _changed(path: Path) -> int:
    """When a file was changed: what is known of it holds until then."""
    return path.stat().st_mtime_ns


@lru_cache(1)
def _lines(path: Path, changed: int) -> np.ndarray:
    """Offsets of the lines of a file that are not blank, and after them the size: int64 [lines + 1]."""
    found, at = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                found.append(at)
            at += len(line)
    return np.asarray([*found, at], dtype=np.int64)


def _read_lines(path: Path, start: int, stop: int) -> Iterator[Record]:
    offsets = _lines(path, _changed(path))
    with path.open("rb") as file:
        for i in range(start, stop):
            file.seek(offsets[i])
            line = file.read(int(offsets[i + 1] - offsets[i]))
            where = f"{path} record {i + 1}"
            try:
                yield Record(where, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Record(where, Unreadable(f"it is no JSON ({error})"))


@lru_cache(1)
def _whole(path: Path, changed: int) -> list[Any]:
    """The records of a file that is read as a whole: a json list, a table, transcripts, a text."""
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_bytes())
            if isinstance(found, Mapping):  # {"data": [..]} and the like
                lists = [v for v in found.values() if isinstance(v, list)]
                found = lists[0] if len(lists) == 1 else found
            if not isinstance(found, list):
                raise DataError(f"{path} has no list of samples; needed: one, or one object a line (.jsonl)")
            return found
        if path.suffix in (".tsv", ".csv"):
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, **tabs))  # type: ignore[call-overload]
        if path.name.endswith(".trans.txt"):
            return [_transcript(line) for line in path.read_text().splitlines() if line.strip()]
        return [{"text": path.read_text()}]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _transcript(line: str) -> dict[str, str]:
    """A line of a LibriSpeech transcript: the name of a recording, and what is said in it."""
    name, _, said = line.partition(" ")
    return {"id": name, "audio": f"{name}.flac", "text": said.strip()}


def _read_whole(path: Path, start: int, stop: int) -> Iterator[Record]:
    for i, value in enumerate(_whole(path, _changed(path))[start:stop], start=start + 1):
        yield Record(f"{path} record {i}", value)


def _count_whole(path: Path) -> int:
    return len(_whole(path, _changed(path)))


@lru_cache(1)
def _members(
    path: Path, changed: int
) -> tuple[tuple[tuple[str, tuple[tuple[str, File], ...]], ...], tuple[str, ...]]:
    """The samples of a tar, each a key and its parts, and what of the tar is lost."""
    found = read_contents(path)
    samples: dict[str, list[tuple[str, File]]] = {}
    for file in found.files:
        place = split_name(file.name)
        if place is not None:
            samples.setdefault(place[0], []).append((place[1], file))
    lost = tuple(f"{loss.name}: {loss.why}" if loss.name else loss.why for loss in found.lost)
    return tuple((key, tuple(parts)) for key, parts in samples.items()), lost


def lost_of(path: Path) -> tuple[str, ...]:
    """What of a damaged tar cannot be read."""
    return _members(path, _changed(path))[1] if path.suffix == ".tar" else ()


def _read_tar(path: Path, start: int, stop: int) -> Iterator[Record]:
    with path.open("rb") as tar:
        for key, files in _members(path, _changed(path))[0][start:stop]:
            parts = {name: os.pread(tar.fileno(), f.size, f.offset) for name, f in files}
            media = {name: p for name, p in parts.items() if kind_of(name) is not None}
            yield Record(f"{path} sample {key}", _merged(parts), media, parts)


def _merged(parts: Mapping[str, bytes]) -> dict[str, Any]:
    """All texts and jsons of a sample as one record: for a mapping of fields that needs several of them."""
    found: dict[str, Any] = {}
    for name, payload in parts.items():
        if kind_of(name) is None and len(payload) < LONGEST_TEXT:
            try:
                value = record_of(payload, name, parts)
            except ValueError:
                continue
            found |= value if isinstance(value, Mapping) else {name: value}
            if ending(name) == "json":
                found[name] = value
    return found


def _count_tar(path: Path) -> int:
    return len(_members(path, _changed(path))[0])


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs {error.name}: pip install -e '.[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _count_rows(path: Path) -> int:
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def _read_rows(path: Path, start: int, stop: int) -> Iterator[Record]:
    at = 0
    with _parquet(path) as file:
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            a, b = max(start, at), min(stop, at + rows)
            for batch in file.iter_batches(batch_size=64, row_groups=[group]) if a < b else ():
                for i, row in enumerate(batch.to_pylist(), start=at):
                    if a <= i < b:
                        payloads: dict[str, bytes] = {}
                        value = {k: _unpacked(k, v, payloads) for k, v in row.items()}
                        yield Record(f"{path} row {i + 1}", value, payloads)
                at += batch.num_rows
            at = at if a < b else at + rows


def _unpacked(name: str, value: Any, payloads: dict[str, bytes]) -> Any:
    """A value of a table with bytes taken out into payloads: in their place is the name of the payload."""
    if isinstance(value, list):
        return [_unpacked(f"{name}{i}", one, payloads) for i, one in enumerate(value)]
    if isinstance(value, Mapping) and set(value) & {"bytes", "path"} and set(value) <= {*DATASETS}:
        if value.get("bytes") is None:
            return value.get("path")  # as the datasets package writes a picture or a sound that is a file
        payloads[made := f"{name}.{_kind(value['bytes'], value.get('path'))}"] = value["bytes"]
        return made
    if isinstance(value, Mapping):
        return {k: _unpacked(f"{name}_{k}", v, payloads) for k, v in value.items()}
    if isinstance(value, bytes):
        payloads[made := f"{name}.{_kind(value, None)}"] = value
        return made
    return value


DATASETS = ("bytes", "path", "sampling_rate")  # fields of a picture or a sound of the datasets package
MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
    b"\x1aE\xdf\xa3": "webm",
}


def _kind(payload: bytes, path: Any) -> str:
    """The ending of a payload, by what it begins with, or by its path."""
    if payload[:4] == b"RIFF":
        return {b"WAVE": "wav", b"WEBP": "webp"}.get(payload[8:12], "bin")
    if payload[4:8] == b"ftyp":
        return "mp4"
    found = next((kind for magic, kind in MAGIC.items() if payload.startswith(magic)), None)
    return found or (ending(path) if isinstance(path, str) and "." in path else "bin")


KINDS: dict[str, Kind] = {  # by ending
    ".tar": Kind(_count_tar, _read_tar),
    ".parquet": Kind(_count_rows, _read_rows),
    ".jsonl": Kind(lambda path: len(_lines(path, _changed(path))) - 1, _read_lines),
    ".json": Kind(_count_whole, _read_whole),
    ".tsv": Kind(_count_whole, _read_whole),
    ".csv": Kind(_count_whole, _read_whole),
    ".trans.txt": Kind(_count_whole, _read_whole),
    ".txt": Kind(_count_whole, _read_whole),
}


def kind_name(path: Path) -> str | None:
    """The key in KINDS of a file; None where it has no records."""
    return next((end for end in KINDS if path.name.lower().endswith(end)), None)


def kind_of_file(path: Path) -> Kind:
    """The kind of a file that has one."""
    name = kind_name(path)
    assert name is not None
    return KINDS[name]
