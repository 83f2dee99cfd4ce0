"""The folders of checkpoints: written under a temporary name, published by a rename, removed by another.

    DIR/step-00000120/          published; `.metadata`, `__R_N.distcp`, state.json, manifest.json
    DIR/step-00000120.tmp/      being written or removed; readers ignore it, and the next save removes it
    DIR/latest                  the name of the newest published one, for scripts; nothing here reads it

Files reach the disk before the folder that lists them, that before the rename, and the rename before whatever
is removed for it. So a loss of power leaves the old checkpoints, or the new one whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.checkpoint import manifest

STATE = "state.json"
LATEST = "latest"
FORMAT = 1  # of what is in a checkpoint's folder; one that an older version would misread has a higher number
_NAME = re.compile(r"step-\d+")
Stay = Callable[[Sequence[Path]], Collection[Path]]  # of the published ones, oldest first, those that stay


def newest(keep: int) -> Stay:
    """The newest `keep` checkpoints stay; 0 keeps all."""
    return lambda found: found[-keep:] if keep else found


def final_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return directory / f"step-{step:08d}"


def partial_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return final_of(directory, step).with_suffix(".tmp")


def published(directory: Path) -> list[Path]:
    """The checkpoints below `directory`, oldest first, damaged ones included: verify() finds those."""
    found = [p for p in directory.glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: (step_of(p), p.name))


def check_there(path: Path) -> None:
    """Raise BadCheckpoint where a path was meant for a checkpoint and is none, however damaged."""
    found = published(path)
    if not path.is_dir():
        what = "it is no folder" if path.exists() else "it does not exist"
        raise manifest.BadCheckpoint(f"{what}; needed: the folder of a checkpoint (step-*)")
    if what := foreign(path):
        raise manifest.BadCheckpoint(what)
    if not found and not _has_own(path) and not _NAME.fullmatch(path.name):
        raise manifest.BadCheckpoint("it has no file of a checkpoint; needed: the folder of one (step-*)")
    if found and not (path / manifest.MANIFEST).is_file():
        raise manifest.BadCheckpoint(f"it is a folder of checkpoints; needed: one of them, as {found[-1]}")


def _has_own(path: Path) -> bool:
    return any((path / name).exists() for name in (manifest.MANIFEST, STATE, ".metadata"))


def foreign(path: Path) -> str:
    """In words, what a folder is that holds weights and is no checkpoint; "" where it may be one."""
    if not path.is_dir() or _has_own(path):
        return ""
    if any(path.glob("*.safetensors")):
        return (
            "it is a published folder (*.safetensors), no checkpoint; `checkpoint import FOLDER NEW` makes "
            "one of a model, and checkpoint.weights and model.X.weights take such folders as they are"
        )
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return "it has pickles (*.bin, *.pt, *.pth), which are never read; needed: *.safetensors"
    return ""


def step_of(path: Path) -> int:
    """The step of a published checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def write_synced(file: Path, text: str) -> None:
    """Write a file, and flush it to the disk."""
    with file.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def write_whole(file: Path, text: str) -> None:
    """Write a file that holds all of the text, on the disk, or what it held before where that fails."""
    partial = file.with_name(f"{file.name}.tmp")
    try:
        write_synced(partial, text)
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    manifest.sync(file.parent)


def write_state(partial: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write what a checkpoint has beside tensors. state: anything that JSON holds."""
    write_synced(partial / STATE, json.dumps({"step": step, "format": FORMAT, **state}, indent=1))


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted save or removal has left, which takes room on the disk."""
    for leftover in directory.glob("step-*.tmp"):
        shutil.rmtree(leftover)


def publish(partial: Path, entries: Mapping[str, manifest.Entry], stay: Stay) -> Path:
    """Give a checkpoint whose files are all there its manifest and its name, then remove those that need not
    stay. Returns its path."""
    directory, final = partial.parent, partial.with_suffix("")
    manifest.write(partial, entries)
    if final.exists():
        remove(final)
    os.replace(partial, final)
    manifest.sync(directory)
    point(directory)
    found = published(directory)
    kept = stay(found)
    for path in found:
        if path not in kept and path != final:
            remove(path)
    return final


def point(directory: Path) -> None:
    """Have `latest` name the newest checkpoint; without any it goes."""
    found = published(directory)
    if not found:
        (directory / LATEST).unlink(missing_ok=True)
        return
    write_whole(directory / LATEST, found[-1].name + "\n")


def remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so an interrupted removal leaves no part under the final name."""
    renamed = path.with_suffix(".gone.tmp")
    os.replace(path, renamed)
    shutil.rmtree(renamed)
