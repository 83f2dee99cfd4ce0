"""Files of a run to which lines are added; a full disk, or a folder that is read-only, ends no run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path


class Lines(io.TextIOBase):
    """A file that grows by whole lines.

    begin: whether what it has is dropped. warn: gets a line when text cannot be written for the first time,
    and when it can again. What could not be written whole is not there at all; `lost` counts such texts.
    """

    def __init__(self, path: Path, warn: Callable[[str], object], *, begin: bool = False) -> None:
        self._path, self._warn, self.lost = path, warn, 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if begin else 0), 0o644)
        self._silent = False

    def writable(self) -> bool:
        """It is; io asks."""
        return True

    def write(self, text: str) -> int:
        """Add text, which should end in a line's end. Never raises for what the disk does."""
        try:
            self._add(text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.lost += 1
            if not self._silent:
                self._silent = True
                self._warn(f"{self._path} cannot be written: {error.strerror}; lines are lost from here on")
            return len(text)
        if self._silent:
            self._silent = False
            self._warn(f"{self._path} can be written again; lost so far: {self.lost} lines")
        return len(text)

    def _add(self, data: bytes) -> None:
        now = os.fstat(self._fd)
        if now.st_nlink == 0:  # what is written to it goes nowhere
            raise OSError(errno.ENOENT, "it was removed")
        begin = now.st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # Half a line would take the next one with it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, begin)
            raise

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._fd)
        super().close()


def forget_after(path: Path, step: int, warn: Callable[[str], object]) -> None:
    """Drop the records of steps after `step`: a run that resumes makes them again.

    Lines that are no records are dropped and counted: what a killed run left unfinished, and damage. The old
    file stays until the new one is whole.
    """
    if not path.exists():
        return
    kept, damaged = [], 0
    with path.open("rb") as lines:
        for line in lines:
            number = _step_of(line)
            damaged += number is None
            if number is not None and number <= step:
                kept.append(line)
    if damaged:
        warn(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        warn(f"{path} keeps the records of steps after {step}: {error.strerror}")


def _step_of(line: bytes) -> float | None:
    """The step of a record; None where it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = line.endswith(b"\n") and isinstance(step, int | float) and not isinstance(step, bool)
    return step if good else None
