"""Room on the disk, and what is said where a run's folder cannot be written to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm.errors import CheckpointError


def room(directory: Path) -> str:
    """How much is free where a folder is, in words."""
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:.0f} MiB free"
    except OSError as error:
        return f"its folder cannot be looked at: {error}"


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Say in words that a file of a run cannot be written, as CheckpointError."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename is not None else ""
        raise CheckpointError(
            f"{directory} cannot be written to: {name}{error.strerror or error} ({room(directory)}); its "
            "checkpoints are as they were. Needed: room there, or another run.dir"
        ) from error
