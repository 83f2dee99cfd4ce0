"""Where shards lie: the one place that lists, measures and reads their files. Local files.

A location is a path as text. Whoever reads asks for bytes by offset: nothing here knows what a shard holds.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

Location = str | os.PathLike[str]


class Version(NamedTuple):
    """What tells a file from one that it was before."""

    size: int  # bytes
    stamp: int  # when it was last changed, nanoseconds


@dataclass(frozen=True)
class OpenFile:
    """A file that is open for reading; threads may share it."""

    descriptor: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of it; fewer where it ends before. Raises OSError."""
        found = os.pread(self.descriptor, size, offset)
        if len(found) in (0, size):
            return found
        # A read gives at most 2 GiB, and may be short on network file systems.
        parts = [found]
        while found and (size := size - len(found)):
            offset += len(found)
            found = os.pread(self.descriptor, size, offset)
            parts.append(found)
        return b"".join(parts)

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Give it back."""
        os.close(self.descriptor)


def open_file(location: Location) -> OpenFile:
    """Open a file for reading. Raises OSError where there is none."""
    return OpenFile(os.open(location, os.O_RDONLY))


@contextmanager
def reading(location: Location) -> Iterator[OpenFile]:
    """open_file(), closed at the end of the block."""
    file = open_file(location)
    try:
        yield file
    finally:
        file.close()


def version_of(location: Location) -> Version:
    """The version of a file now. Raises OSError where there is none."""
    now = os.stat(location)
    return Version(now.st_size, now.st_mtime_ns)


def find(pattern: str) -> list[str]:
    """The files that a glob matches, in order of name."""
    return sorted(glob.glob(pattern))
