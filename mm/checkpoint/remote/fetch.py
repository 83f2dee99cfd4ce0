"""A checkpoint of a target brought to this machine; nothing of it is used that does not match its sums."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mm.checkpoint.remote.copies import FILES
from mm.checkpoint.remote.index import Entry, step_of
from mm.data.remote.folder import Folder, OtherSize
from mm.data.remote.retry import Changed
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.checkpoint import manifest

TRIES = 2  # of a file whose sum differs: it may have been changed on the way


def read_manifest(folder: Folder, entry: Entry, out: Path) -> dict[str, manifest.Entry]:
    """Write the manifest of a checkpoint into `out`, an empty folder, and return the files that it lists.

    Raises BadCheckpoint where it is not the one that was copied, and FileNotFoundError where it is gone.
    """
    data = folder.read(f"{entry.folder}/{store.MANIFEST}", manifest.MOST_BYTES)
    if hashlib.sha256(data).hexdigest() != entry.manifest:
        raise store.BadCheckpoint(f"{store.MANIFEST} differs from what was copied (sha256)")
    with (out / store.MANIFEST).open("xb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return manifest.entries(out)


def verify(folder: Folder, entry: Entry, listed: Mapping[str, manifest.Entry]) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; reads them all, and writes nothing."""

    def look(file: str) -> str:
        try:
            return _differs(
                file, _read(folder, f"{entry.folder}/{file}", listed[file], lambda data: None), listed
            )
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(FILES) as pool:
        return [line for line in pool.map(look, sorted(listed)) if line]


def fetch(folder: Folder, name: str, entry: Entry, directory: Path) -> Path:
    """Bring a checkpoint to `directory`, where it is published once it is whole; returns its path.

    Raises BadCheckpoint or OSError where it is damaged or gone, and CheckpointError where it cannot be
    written; nothing is left then.
    """
    final, partial_ = directory / name, store.partial_of(directory, step_of(name))
    try:
        shutil.rmtree(partial_, ignore_errors=True)
        partial_.mkdir(parents=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error
    try:
        listed = read_manifest(folder, entry, partial_)
        needed = sum(one.bytes for one in listed.values())
        if needed > free:
            raise CheckpointError(
                f"{folder.name(name)} has {needed / 2**20:.0f} MiB, {directory} has {free / 2**20:.0f} MiB "
                "free; needed: room, or another run.dir"
            )
        with ThreadPoolExecutor(FILES) as pool:
            try:
                for _ in pool.map(
                    partial(_fetch_file, folder.within(entry.folder), listed, partial_), sorted(listed)
                ):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for inside in {partial_, *(p.parent for p in partial_.rglob("*"))}:
            manifest.sync(inside)
        os.replace(partial_, final)
        manifest.sync(directory)
        store.point(directory)
    except BaseException:
        shutil.rmtree(partial_, ignore_errors=True)
        raise
    return final


def _fetch_file(folder: Folder, listed: Mapping[str, manifest.Entry], out: Path, file: str) -> None:
    path = out / file
    for left in reversed(range(TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as writing:
                found = _read(folder, file, listed[file], partial(_write, writing.write, path))
                writing.flush()
                os.fsync(writing.fileno())
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise store.BadCheckpoint(f"{store.MANIFEST} lists {file} and a file below it") from error
        except (OtherSize, Changed) as error:
            raise store.BadCheckpoint(str(error)) from error
        wrong = _differs(file, found, listed)
        if not wrong:
            return
        if not left:
            raise store.BadCheckpoint(wrong)


def _write(write: Callable[[bytes], object], path: Path, data: bytes) -> None:
    try:
        write(data)
    except OSError as error:  # of this disk, not of the store
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _read(
    folder: Folder, name: str, entry: manifest.Entry, take: Callable[[bytes], object]
) -> manifest.Entry:
    """Read a file to its end; take: gets all of it, piece by piece. Returns what it had."""
    digest, size = hashlib.sha256(), 0
    for data in folder.stream(name, entry.bytes):
        take(data)
        digest.update(data)
        size += len(data)
    return manifest.Entry(size, digest.hexdigest())


def _differs(file: str, found: manifest.Entry, listed: Mapping[str, manifest.Entry]) -> str:
    return "" if found == listed[file] else f"{file} differs from what was copied (sha256)"
