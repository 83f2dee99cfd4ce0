"""A folder of a store: objects listed, read, written and removed, each request tried again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from mm.data.remote.client import AHEAD, CHUNK, Client
from mm.data.remote.retry import Limits
from mm.data.remote.stores import Parts, Store
from mm.data.remote.urls import check_target
from mm.errors import DataError

MOST_PARTS = 9000  # of an object; S3 takes 10,000


class OtherSize(OSError):
    """An object that has another size than was written."""


class Read(NamedTuple):
    """What a file had as it was read: bytes and their sha256 in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass
class Pace:
    """Holds threads back so that together they send at most so many bytes a second; 0: as many as go."""

    bytes_per_s: float = 0.0
    _free: float = field(default=0.0, repr=False)  # when the next bytes may go
    _lock: Lock = field(default_factory=Lock, repr=False)

    def wait(self, size: int) -> None:
        """Wait until `size` more bytes may be sent."""
        if not self.bytes_per_s:
            return
        with self._lock:
            begin = max(self._free, time.monotonic())
            self._free = begin + size / self.bytes_per_s
        time.sleep(max(0.0, begin - time.monotonic()))


@dataclass(frozen=True)
class Folder:
    """Objects by their names below a URL, which ends without a slash. Threads may share it.

    Raises retry.Unreachable where the store does not answer, and OSError for one object.
    """

    url: str
    client: Client

    @staticmethod
    def of(url: str, timeout_s: float) -> Folder:
        """The folder of a URL. timeout_s: longest wait for one answer. Raises DataError where its store
        cannot be written to, or its package is missing."""
        check_target(url)
        return Folder(url.rstrip("/"), Client(Limits(timeout_s=timeout_s), warn=lambda line: None))

    def within(self, name: str) -> Folder:
        """A folder in this one."""
        return Folder(self.name(name), self.client)

    def name(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of all objects at any depth, by name."""
        return self.client.ask(self.url, f"the list of {self.url}/", lambda store: store.below(self.url))

    def read(self, name: str, most: int) -> bytes:
        """A small object. Raises OSError where it has more than `most` bytes."""
        url = self.name(name)
        stat = self.client.stat(url)
        if stat.size > most:
            raise OSError(f"{url} has {stat.size} bytes; it is read up to {most}")
        return b"".join(data for _, data in self.client.stream(url, stat))

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """An object from its beginning to its end. Raises OtherSize where it has another size, and
        retry.Changed where it becomes another object meanwhile."""
        url = self.name(name)
        stat = self.client.stat(url)
        if stat.size != size:
            raise OtherSize(f"{url} has {stat.size} bytes, {size} were written")
        yield from (data for _, data in self.client.stream(url, stat))

    def write(self, name: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        url = self.name(name)
        self.client.ask(url, f"writing {url}", lambda store: store.put(url, data))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; it is no error where one is not there."""
        requests = [partial(_remove, url=self.name(name)) for name in names]
        self.client.ask_all(self.url, f"removing objects of {self.url}/", requests)

    def clear(self) -> None:
        """Remove all objects, and what there is of unfinished ones where the store lets one see them."""
        self.remove(self.sizes())
        with contextlib.suppress(OSError):
            self.client.ask(self.url, f"parts in {self.url}/", lambda store: store.forget_parts(self.url))

    def upload(self, name: str, path: Path, pace: Pace) -> Read:
        """Write an object of a file's content; returns what was read of the file. Of a large one each part is
        tried again by itself."""
        url, digest, sent = self.name(name), hashlib.sha256(), 0
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= CHUNK:
                data = file.read()
                pace.wait(len(data))
                self.write(name, data)
                return Read(len(data), hashlib.sha256(data).hexdigest())
            parts = self.client.ask(url, f"writing {url}", lambda store: store.in_parts(url))
            if parts is None:
                return self._upload_whole(url, path, pace)
            try:
                number, step = 1, max(CHUNK, -(-size // MOST_PARTS))
                while some := [data for _ in range(AHEAD) if (data := file.read(step))]:
                    for data in some:
                        digest.update(data)
                        pace.wait(len(data))
                    starts = [sent + k * step for k in range(len(some))]
                    requests = [
                        partial(_write_part, parts=parts, number=number + k, offset=starts[k], data=data)
                        for k, data in enumerate(some)
                    ]
                    self.client.ask_all(url, f"writing bytes from {sent} of {url}", requests)
                    number, sent = number + len(some), sent + sum(map(len, some))
                self._finish(url, parts, sent)
            except BaseException:
                with contextlib.suppress(OSError, DataError):  # what has gone wrong before is the reason
                    self.client.ask(url, f"dropping parts of {url}", lambda store: parts.drop())
                raise
        return Read(sent, digest.hexdigest())

    def _finish(self, url: str, parts: Parts, size: int) -> None:
        try:
            self.client.ask(url, f"writing {url}", lambda store: parts.finish())
        except (OSError, DataError):
            # An attempt whose answer was lost has finished it, and the next one finds no parts.
            if self.client.stat(url).size != size:
                raise

    def _upload_whole(self, url: str, path: Path, pace: Pace) -> Read:
        """upload() to a store without parts, in one request with as much time as its parts would have."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                size += len(data)
        pace.wait(size)
        request = partial(_write_file, url=url, path=path)
        self.client.ask(url, f"writing {url}", request, patience=-(-size // CHUNK))
        return Read(size, digest.hexdigest())


# Functions, not lambdas: each is called with its own arguments, whenever that is.


async def _remove(store: Store, *, url: str) -> None:
    await store.remove(url)


async def _write_part(store: Store, *, parts: Parts, number: int, offset: int, data: bytes) -> None:
    await parts.part(number, offset, data)


async def _write_file(store: Store, *, url: str, path: Path) -> None:
    await store.put_file(url, path)
