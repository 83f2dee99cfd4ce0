"""Blocks of remote objects on a local disk, of bounded size, shared by all processes of a machine.

One file has the blocks, each in one of the WAYS places that its key allows. A second one has by place the key
and the sum of the block. Nothing is locked. A block that is being replaced, is torn or was damaged on the
disk fails its sum, and counts as absent: it is asked for again.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 64 << 10  # bytes: the usual picture is larger, and a block more than its bytes takes 1 ms at 64 MB/s
WAYS = 32  # places that a key allows: with so many, no place stays empty for long while others are full
_SUM = 16  # bytes of a key, and of a sum
_ENTRY = 2 * _SUM


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_SUM).digest()


def block_key(name: str, version: str, number: int) -> bytes:
    """What a block is kept under: an object that changes has other blocks."""
    return _digest(f"{name}\0{version}\0{number}".encode())


@dataclass(frozen=True)
class BlockCache:
    """At most `limit` bytes of blocks in a folder. A lookup reads WAYS * 32 bytes, a hit the block too.

    Threads and processes may share it. warn: told once where the disk is full or cannot be written.
    """

    folder: Path
    limit: int
    warn: Callable[[str], object] = field(default=print, repr=False)
    _files: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    _warned: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def sets(self) -> int:
        """Groups of WAYS places; 0 where `limit` has room for none."""
        return self.limit // (WAYS * (BLOCK + _ENTRY))

    def get(self, key: bytes, size: int) -> bytes | None:
        """The block of `size` bytes kept under a key; None where it is absent or damaged."""
        files = self._open()
        if files is None:
            return None
        with suppress(OSError):
            first, entries = self._entries(files, key)
            for way in range(WAYS):
                at = way * _ENTRY
                if entries[at : at + _SUM] == key:
                    data = os.pread(files[1], size, (first + way) * BLOCK)
                    if len(data) == size and _digest(data) == entries[at + _SUM : at + _ENTRY]:
                        return data
        return None

    def put(self, key: bytes, data: bytes) -> None:
        """Keep a block; where all places that it may have are taken, another one goes."""
        files = self._open()
        if files is None:
            return
        assert len(data) <= BLOCK
        try:
            first, entries = self._entries(files, key)
            keys = [entries[at : at + _SUM] for at in range(0, WAYS * _ENTRY, _ENTRY)]
            if key in keys:
                way = keys.index(key)  # damaged, or another process was first
            elif bytes(_SUM) in keys:
                way = keys.index(bytes(_SUM))
            else:
                way = random.randrange(WAYS)
            # The entry last: a reader that finds the key finds the block, or a sum that differs.
            os.pwrite(files[1], data, (first + way) * BLOCK)
            os.pwrite(files[0], key + _digest(data), (first + way) * _ENTRY)
        except OSError as error:
            self._tell(error)

    def _entries(self, files: tuple[int, int], key: bytes) -> tuple[int, bytes]:
        """The first place that a key allows, and the entries of its WAYS places."""
        first = int.from_bytes(key[:8], "little") % self.sets * WAYS
        return first, os.pread(files[0], WAYS * _ENTRY, first * _ENTRY).ljust(WAYS * _ENTRY, b"\0")

    def _open(self) -> tuple[int, int] | None:
        """Descriptors of the entries and of the blocks, opened on demand; None where nothing is kept.

        Files of another limit go: a process that still has them open goes on with them until it ends.
        """
        if not self.sets:
            return None
        try:
            return self._files.get(0) or self._files.setdefault(0, self._create())
        except OSError as error:
            self._tell(error)
            return None

    def _create(self) -> tuple[int, int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [f"{kind}-{self.sets}" for kind in ("entries", "blocks")]
        for old in self.folder.iterdir():
            if old.name.startswith(("entries-", "blocks-")) and old.name not in names:
                old.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        entries, blocks = (os.open(self.folder / name, flags, 0o600) for name in names)
        return entries, blocks

    def _tell(self, error: OSError) -> None:
        if not self._warned:
            self._warned.append(str(error))
            self.warn(f"{self.folder} cannot keep blocks of remote shards: {error.strerror}")
