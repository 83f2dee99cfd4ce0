"""The checkpoints of a target, for whoever asks: listed, described, verified, brought here."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from mm.checkpoint.remote.copies import read_index
from mm.checkpoint.remote.fetch import fetch, read_manifest, verify
from mm.checkpoint.remote.index import Entry, RemoteIndex, is_name
from mm.checkpoint.state import tensors_text
from mm.data.remote.folder import Folder
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from parallel.checkpoint.metadata import METADATA

TIMEOUT_S = 30.0  # of one answer
SMALL = (METADATA, store.STATE)  # what is said of a checkpoint without its tensors is in these


def list_remote(url: str, *, sums: bool = False) -> str:
    """A line for each checkpoint of a target. sums: compare the sum of every file too, which reads all."""
    folder, index = _target(url)
    names, lines = index.newest_first, list[str]()
    for name in reversed(names):
        entry, wrong = index.checkpoints[name], list[str]()
        if sums:
            wrong = _wrong(folder, entry)
        sound = f"damaged ({'; '.join(wrong)})" if wrong else "whole" if sums else ""
        values = ", ".join(f"{k} {v:.4f}" for k, v in entry.metrics.items())
        parts = [f"{entry.bytes / 2**20:.1f} MiB", sound, values]
        latest = " (latest)" if name == names[0] else ""
        lines.append(f"{name}{latest}: {'; '.join(part for part in parts if part)}")
    lines += [
        f"{name}: being copied or removed, or left by what was interrupted" for name in index.unfinished
    ]
    return "\n".join(lines) or f"{folder.url}: no checkpoint yet"


def inspect_remote(url: str) -> str:
    """Step, tensors and sizes of a checkpoint of a target; reads no tensor data."""
    folder, name, entry = _one(url)
    with TemporaryDirectory() as out:
        path = Path(out)
        try:
            listed = read_manifest(folder, entry, path)
            for file in SMALL:
                (path / file).write_bytes(folder.read(f"{entry.folder}/{file}", manifest.MOST_BYTES))
            there = folder.within(entry.folder).sizes()
            wrong = [f for f, one in listed.items() if there.get(f) != one.bytes]
            if wrong:
                raise store.BadCheckpoint(f"{', '.join(wrong[:8])} missing or of another size")
            return tensors_text(path, folder.name(name))
        except (store.BadCheckpoint, OSError) as error:
            raise CheckpointError(f"{folder.name(name)} is damaged: {error}") from error


def verify_remote(url: str) -> str:
    """A line that a checkpoint of a target is undamaged; raises CheckpointError naming every damaged file.
    Reads all of it, and writes nothing."""
    folder, name, entry = _one(url)
    wrong = _wrong(folder, entry)
    if wrong:
        raise CheckpointError(f"{folder.name(name)}: {'; '.join(wrong)}")
    return f"{folder.name(name)}: whole"


def fetch_remote(url: str, out: Path) -> str:
    """Bring a checkpoint of a target to the folder `out`; raises CheckpointError where it is damaged."""
    folder, name, entry = _one(url)
    if (out / name).exists():
        raise CheckpointError(f"{out / name} is there already")
    try:
        return str(fetch(folder, name, entry, out))
    except (store.BadCheckpoint, OSError) as error:
        raise CheckpointError(f"{folder.name(name)} is damaged: {error}") from error


def _wrong(folder: Folder, entry: Entry) -> list[str]:
    with TemporaryDirectory() as out:
        try:
            return verify(folder, entry, read_manifest(folder, entry, Path(out)))
        except (store.BadCheckpoint, OSError) as error:
            return [str(error)]


def _target(url: str) -> tuple[Folder, RemoteIndex]:
    folder = Folder.of(url, TIMEOUT_S)
    try:
        index = read_index(folder)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    if index is None:
        raise CheckpointError(f"{folder.url} has no checkpoints; needed: the checkpoint.remote.url of a run")
    return folder, index


def _one(url: str) -> tuple[Folder, str, Entry]:
    above, _, name = url.rstrip("/").rpartition("/")
    if not is_name(name):
        raise CheckpointError(
            f"{url} names no checkpoint; needed: URL/step-.., as `checkpoint list URL` has them"
        )
    folder, index = _target(above)
    if name not in index.checkpoints:
        there = ", ".join(index.newest_first[:8]) or "none"
        raise CheckpointError(f"{folder.url} has no checkpoint {name}; there: {there}")
    return folder, name, index.checkpoints[name]
