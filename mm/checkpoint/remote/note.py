"""remote.json in a run's folder: the run that its target belongs to, and what is being copied there now."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel import checkpoint as store

NOTE = "remote.json"


@dataclass(frozen=True)
class Note:
    """run: as the target's index has it. copying: the checkpoint that must stay until it is copied."""

    run: str
    copying: str | None = None


def read_note(directory: Path) -> Note | None:
    """The note of a run's folder; None where there is none that can be read."""
    try:
        raw = json.loads((directory / NOTE).read_text())
        run, copying = raw["run"], raw["copying"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Note(run, copying) if isinstance(run, str) and isinstance(copying, str | None) else None


def write_note(directory: Path, note: Note) -> None:
    """Write the note, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{NOTE}.tmp"
    partial.write_text(json.dumps(vars(note)))
    os.replace(partial, directory / NOTE)


def with_copied(stay: store.Stay, directory: Path) -> store.Stay:
    """`stay`, and the checkpoint that is being copied."""

    def both(found: Sequence[Path]) -> Collection[Path]:
        note = read_note(directory)
        return {*stay(found), *(p for p in found if note is not None and p.name == note.copying)}

    return both
