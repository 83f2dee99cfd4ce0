"""The manifest of a checkpoint: name, size and sha256 of every file, and a sum of the manifest itself.

No file is read from a checkpoint unless its manifest lists it. A folder with unlisted files counts as
damaged.

    {"state.json": {"bytes": 1234, "sha256": ".."}, .., "manifest.json": {"sha256": ".."}}

The last entry is the sha256 of all the others, as JSON without spaces and with sorted keys. Old manifests
lack this entry; they are read all the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
MOST_BYTES = 1 << 30  # of a file that is read whole: the manifest, the state, the metadata
BLOCK = 1 << 24  # bytes between two calls of heartbeat()
SOON_READ = 1 << 28  # bytes of a file that may be all holes: it is summed in a moment
HOLLOW = 16  # times what lies in a larger file, at most, that it may be long: weights hold few zeros
EXTENTS = 4096  # parts of a file between holes that are looked at


class BadCheckpoint(ValueError):
    """A checkpoint that is incomplete, damaged or of another model."""


class Entry(NamedTuple):
    """Size in bytes and sha256 in hexadecimal digits of one file."""

    bytes: int
    sha256: str


def entry_of(file: Path, heartbeat: Callable[[], object] = lambda: None) -> Entry:
    """The entry of `file` as it is now. heartbeat: called every BLOCK bytes, since large files take long."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb", buffering=0) as f:
        while block := f.read(BLOCK):
            digest.update(block)
            size += len(block)
            heartbeat()
    return Entry(size, digest.hexdigest())


def write(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of `folder`, and flush it to the disk."""
    listed: dict[str, Any] = {n: {"bytes": e.bytes, "sha256": e.sha256} for n, e in sorted(entries.items())}
    with (folder / MANIFEST).open("w") as f:
        json.dump({**listed, MANIFEST: {"sha256": _sum(listed)}}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    sync(folder)


def entries(folder: Path) -> dict[str, Entry]:
    """The files that the manifest of `folder` lists; raises BadCheckpoint where the manifest is damaged."""
    try:
        _check_small(folder / MANIFEST)
        listed = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise BadCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{MANIFEST} is unreadable: {error}") from error
    if not isinstance(listed, dict):
        raise BadCheckpoint(f"{MANIFEST} is no list of files by name")
    own = listed.pop(MANIFEST, None)
    if not listed:
        raise BadCheckpoint(f"{MANIFEST} lists no file")
    if own is not None and own != {"sha256": _sum(listed)}:
        raise BadCheckpoint(f"{MANIFEST} differs from what was written (sha256)")
    return {name: _entry(name, value) for name, value in listed.items()}


def read(folder: Path, name: str) -> bytes:
    """The content of a checkpoint's file; raises BadCheckpoint where it differs from its manifest entry."""
    try:
        listed = entries(folder)
        if name not in listed:
            raise BadCheckpoint(f"{name} is not listed in {MANIFEST}")
        _check_small(folder / name)
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        raise BadCheckpoint(f"{folder}: {name} is missing") from None
    except OSError as error:
        raise BadCheckpoint(f"{folder}: {name} is unreadable: {error}") from error
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{folder}: {error}") from error
    found = Entry(len(content), hashlib.sha256(content).hexdigest())
    if found != listed[name]:
        raise BadCheckpoint(f"{folder}: {_difference(name, found, listed[name])}")
    return content


def structure(folder: Path) -> list[str]:
    """Errors in the names and sizes of a checkpoint's files, one line each; reads only the manifest."""
    try:
        listed = entries(folder)
        found = {name: (folder / name).stat().st_size for name in names(folder)}
        links = [p for p in folder.rglob("*") if p.is_symlink()]
    except (OSError, BadCheckpoint) as error:
        return [str(error)]
    if links:
        return [f"{p.relative_to(folder).as_posix()} is a link; needed: files of this folder" for p in links]
    out = [f"{name} is not listed in {MANIFEST}" for name in sorted(found.keys() - listed.keys())]
    for name, entry in listed.items():
        if name not in found:
            out.append(f"{name} is missing")
        elif found[name] != entry.bytes:
            out.append(_difference(name, Entry(found[name], ""), entry))
        elif hollow(folder / name):
            out.append(f"{name} has {entry.bytes} bytes, nearly all of them in holes that hold nothing")
    return out


def hollow(file: Path) -> bool:
    """Whether a large file is nearly all holes (it is sparse), which would take long to sum for nothing.

    Where a file system cannot say where holes are, a file has none.
    """
    found = file.stat()
    if found.st_size <= SOON_READ or found.st_blocks * 512 * HOLLOW >= found.st_size:
        return False
    held, at = 0, 0
    with file.open("rb", buffering=0) as f:
        for _ in range(EXTENTS):
            try:
                first = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # it knows no holes
                    return False
                break  # no more data
            at = os.lseek(f.fileno(), first, os.SEEK_HOLE)
            held += at - first
    return held * HOLLOW < found.st_size


def verify(
    folder: Path, part: int = 0, of: int = 1, heartbeat: Callable[[], object] = lambda: None
) -> list[str]:
    """Errors in the files of a checkpoint, one line each; empty where all files are as written.

    part, of: which share of the files to sum, so `of` processes can verify one checkpoint together. Part 0
        also reports errors in names and sizes.
    heartbeat: called every BLOCK bytes.
    """
    out = structure(folder) if part == 0 else []
    try:
        listed = entries(folder)
    except BadCheckpoint:
        return out
    for name in sorted(listed, key=lambda n: (-listed[n].bytes, n))[part::of]:
        try:
            if (folder / name).stat().st_size != listed[name].bytes or hollow(folder / name):
                continue  # part 0 says it
            found = entry_of(folder / name, heartbeat)
        except FileNotFoundError:
            continue
        except OSError as error:
            out.append(f"{name} is unreadable: {error}")
            continue
        if found != listed[name]:
            out.append(_difference(name, found, listed[name]))
    return out


def _check_small(file: Path) -> None:
    """Raise BadCheckpoint where a file is a link, a pipe or a device, or larger than what is read whole."""
    found = file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise BadCheckpoint(f"{file.name} is no plain file")
    if found.st_size > MOST_BYTES:
        raise BadCheckpoint(f"{file.name} has {found.st_size} bytes; it is read up to {MOST_BYTES}")


def names(folder: Path) -> list[str]:
    """The names of all files below `folder` except the manifest, as a manifest writes them."""
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in files if name != MANIFEST]


def sync(folder: Path) -> None:
    """Flush the directory `folder` to the disk, so the names in it survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _entry(name: str, value: Any) -> Entry:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
    if inside and isinstance(value, dict) and value.keys() == {"bytes", "sha256"}:
        size, digest = value["bytes"], value["sha256"]
        if type(size) is int and size >= 0 and isinstance(digest, str):
            return Entry(size, digest)
    raise BadCheckpoint(f"{MANIFEST}: the entry of {name!r} is no size and sha256 of a file of this folder")


def _difference(name: str, found: Entry, written: Entry) -> str:
    if found.bytes != written.bytes:
        return f"{name} has {found.bytes} bytes, {written.bytes} were written"
    return f"{name} differs from what was written (sha256)"


def _sum(listed: Mapping[str, Any]) -> str:
    text = json.dumps(listed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
