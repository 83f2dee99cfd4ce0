"""One shard at a time: records in, a tar and a note out. The same bytes whoever makes it, and whenever.

A tar appears when it is whole, and its note before it: a shard whose tar and note are there is done.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from mm.data.convert.records import Record, kind_of_file, lost_of
from mm.data.convert.samples import Missing, sample_of
from mm.errors import DataError

NOTES = ".convert"  # folder of the notes


class Span(TypedDict):
    """Records [start, stop) of a file, in a layout."""

    file: str
    start: int
    stop: int
    layout: str


@dataclass(frozen=True)
class Shard:
    """What a worker makes: number, the folder and name of data, its records and where media are.

    first: number of its first record among all.
    """

    number: int
    out: Path
    name: str
    spans: tuple[Span, ...]
    first: int
    media: tuple[str, ...]

    @property
    def tar(self) -> Path:
        """Where its samples go."""
        return self.out / f"{self.name}-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        """Where what became of its records goes."""
        return self.out / NOTES / f"{self.number:06d}.json"


class Note(TypedDict):
    """What became of the records of a shard."""

    samples: int
    bytes: int  # of the tar
    missing: int  # of the records that are left out, those that lack a medium
    bad: list[dict[str, str]]  # records that are left out: where, why


def finished(shard: Shard) -> Note | None:
    """The note of a shard that is made; None where it is not, or not whole."""
    try:
        note: Note = json.loads(shard.note.read_text())
        whole = not note["samples"] or shard.tar.stat().st_size == note["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if whole else None


def make_shard(shard: Shard) -> Note:
    """Make a shard and its note. Raises DataError where a file cannot be read or written."""
    note = Note(samples=0, bytes=0, missing=0, bad=[])
    try:
        with _appearing(shard.tar) as target:
            with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for number, record, span in _records(shard, note):
                    _add(tar, shard, number, record, span, note)
            note["bytes"] = target.tell()
            target.keep = note["samples"] > 0
            _write(shard.note, json.dumps(note, ensure_ascii=False, indent=0))
    except OSError as error:
        raise DataError(f"{shard.tar} cannot be written: {error}") from error
    return note


class _Target(io.FileIO):
    """The file that becomes a tar where `keep` is set."""

    keep = False


class _appearing:
    """A file that takes its name when it is whole, and is gone where that fails."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> _Target:
        self.file = _Target(self.partial, "w")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.file.close()
        if kind is None and self.file.keep:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def _records(shard: Shard, note: Note) -> Iterator[tuple[int, Record, Span]]:
    """The records of a shard with their numbers. What is lost of a tar is noted with its first records."""
    number = shard.first
    for span in shard.spans:
        file = Path(span["file"])
        if not span["start"]:
            note["bad"] += [{"where": str(file), "why": why} for why in lost_of(file)]
        for record in kind_of_file(file).read(file, span["start"], span["stop"]):
            yield number, record, span
            number += 1


def _add(tar: tarfile.TarFile, shard: Shard, number: int, record: Record, span: Span, note: Note) -> None:
    """Append a record's sample to a tar, or the reason why there is none to the note."""
    roots = [Path(p) for p in (*shard.media, str(Path(span["file"]).parent))]
    try:
        made = sample_of(record, span["layout"], roots)
    except ValueError as error:
        note["missing"] += isinstance(error, Missing)
        note["bad"].append({"where": record.where, "why": str(error)})
        return
    for name, payload in {"json": made.json, **made.parts}.items():
        header = tarfile.TarInfo(f"{number:09d}.{name}")
        header.size, header.uname, header.gname = len(payload), "polyrank", "polyrank"
        tar.addfile(header, io.BytesIO(payload))
    note["samples"] += 1
