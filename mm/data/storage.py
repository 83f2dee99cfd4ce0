"""Where shards lie: the one place that lists, measures and reads their files, on this machine or elsewhere.

A location is a path or a URL, as text. Whoever reads asks for bytes by offset: nothing here knows what a
shard holds.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import braceexpand

from mm.data.remote.retry import Limits
from mm.data.remote.shards import RemoteShards
from mm.data.remote.stores import Stat
from mm.data.remote.urls import is_remote, public
from mm.errors import DataError

Location = str | os.PathLike[str]
Say = Callable[[str], object]


class Version(NamedTuple):
    """What tells a file from one that it was before."""

    size: int  # bytes
    stamp: int  # when it was last changed, nanoseconds; of a remote one a number made of its version


class OpenFile(Protocol):
    """A file that is open for reading; threads may share it."""

    @property
    def version(self) -> Version:
        """The file's version, as it was opened."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of it; fewer where it ends before. Raises OSError."""

    def read_many(self, wanted: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        """read_at() of many (offset, size), which a remote store is asked for together."""

    def close(self) -> None:
        """Give it back."""


@dataclass(frozen=True)
class LocalFile:
    """An OpenFile of this machine. stands_for: the version of the file that it is a copy of."""

    descriptor: int
    stands_for: Version | None = None

    @property
    def version(self) -> Version:
        now = os.fstat(self.descriptor)
        return self.stands_for or Version(now.st_size, now.st_mtime_ns)

    def read_at(self, offset: int, size: int) -> bytes:
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

    def read_many(self, wanted: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        out: list[bytes | OSError] = []
        for offset, size in wanted:
            try:
                out.append(self.read_at(offset, size))
            except OSError as error:
                out.append(error)
        return out

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True)
class RemoteFile:
    """An OpenFile of a store; it has nothing to give back."""

    shards: RemoteShards
    name: str

    @property
    def version(self) -> Version:
        return _version(self.shards.stat(self.name))

    def read_at(self, offset: int, size: int) -> bytes:
        return self.shards.read(self.name, offset, size)

    def read_many(self, wanted: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        try:
            return [*self.shards.read_many([(self.name, *one) for one in wanted])]
        except OSError as error:  # the object is gone, or another one now
            return [error] * len(wanted)

    def close(self) -> None:
        pass


def _version(stat: Stat) -> Version:
    digest = hashlib.blake2b(stat.version.encode(), digest_size=8).digest()
    return Version(stat.size, int.from_bytes(digest, "little") >> 1)


def tell(text: str) -> None:
    """Write a line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Storage:
    """Where shards are read, and who hears of what takes long or is tried again.

    remote: for URLs; None: there are none, or no folder to keep their indexes in. Threads may share it, and
    processes that are forked from this one or get it pickled.
    """

    remote: RemoteShards | None = None
    say: Say = tell

    @staticmethod
    def of(
        patterns: Iterable[str],
        cache: str | None,
        cache_bytes: int,
        timeout_s: float,
        say: Say = tell,
    ) -> Storage:
        """What reads the shards of patterns, whose passwords go into requests alone. cache: a folder."""
        if cache is None:
            return Storage(say=say)
        limits = Limits(timeout_s=timeout_s)
        remote = RemoteShards.of(Path(cache), cache_bytes, patterns=patterns, limits=limits, warn=say)
        return Storage(remote, say)

    @property
    def patience_s(self) -> float:
        """The longest time that one read may take before it is given up."""
        return 0.0 if self.remote is None else self.remote.client.limits.longest_s

    def find(self, pattern: str) -> list[str]:
        """The files that a glob with braces matches, in order of name for each of its braces."""
        if is_remote(pattern):
            return self._remote(pattern).find(pattern)
        return [path for one in braceexpand.braceexpand(pattern) for path in sorted(glob.glob(one))]

    def open_file(self, location: Location) -> OpenFile:
        """Open a file for reading. Raises OSError where there is none."""
        name = os.fspath(location)
        if is_remote(name):
            return RemoteFile(self._remote(name), name)
        return LocalFile(os.open(name, os.O_RDONLY))

    @contextmanager
    def reading(self, location: Location) -> Iterator[OpenFile]:
        """open_file(), closed at the end of the block."""
        file = self.open_file(location)
        try:
            yield file
        finally:
            file.close()

    @contextmanager
    def scanning(self, location: Location) -> Iterator[OpenFile]:
        """reading(), for who reads all of it in small pieces: a remote file is streamed here, once."""
        name = os.fspath(location)
        if not is_remote(name):
            with self.reading(name) as file:
                yield file
            return
        remote = self._remote(name)
        with remote.local(name) as path:
            copy = LocalFile(os.open(path, os.O_RDONLY), _version(remote.stat(name)))
            try:
                yield copy
            finally:
                copy.close()

    def read_many(self, wanted: Sequence[tuple[str, int, int]]) -> dict[tuple[str, int, int], bytes]:
        """By (URL, offset, size), the bytes there, asked for together; none where one cannot be read."""
        if not wanted:
            return {}
        try:
            found = self._remote(wanted[0][0]).read_many(wanted)
        except OSError:
            return {}
        return dict(zip(wanted, found, strict=True))

    def version_of(self, location: Location) -> Version:
        """The version of a file now, of a remote one as it was listed. Raises OSError where there is none."""
        name = os.fspath(location)
        if is_remote(name):
            return _version(self._remote(name).stat(name))
        now = os.stat(name)
        return Version(now.st_size, now.st_mtime_ns)

    def folder_of(self, location: Location) -> Path:
        """Where files about a shard lie: in its folder; of a remote one in a folder of the cache."""
        name = os.fspath(location)
        return self._remote(name).sidecars(name) if is_remote(name) else Path(name).parent

    def _remote(self, name: str) -> RemoteShards:
        if self.remote is None:
            raise DataError(
                f"{public(name)} is not on this machine; needed: data.remote.cache=FOLDER, on a local disk, "
                "for what is kept of it (docs/data_remote.md)"
            )
        return self.remote


LOCAL = Storage()  # for paths of this machine
