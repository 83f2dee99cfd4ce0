"""Requests as the threads of a job make them: many at once, each with a time limit, tried again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import braceexpand

from mm.data.remote.retry import Limits, Short, persist
from mm.data.remote.stores import Stat, Store, open_store
from mm.data.remote.urls import check, public, scheme_of
from mm.errors import DataError

T = TypeVar("T")
IN_FLIGHT = 16  # requests of one call that are under way at once
CHUNK = 8 << 20  # bytes of a request where a whole object is read: the pause between two of them is small
AHEAD = 4  # such requests at once, and as many chunks in memory
LISTED = 8  # names of one pattern from which on a listing takes less time than asking for each


class Range(NamedTuple):
    """Bytes [offset, offset + size) of an object."""

    name: str
    version: str
    offset: int
    size: int


@dataclass(frozen=True)
class Client:
    """Requests to any store. Threads may share it, and processes that are forked from this one.

    secrets: by name, the URL to ask for where it is another (urls.secrets_of). warn: told of each further
    attempt. Raises retry.Unreachable where a store does not answer, and OSError for one object.
    """

    limits: Limits
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    warn: Callable[[str], object] = field(default=print, repr=False)
    # Connections and the thread of their loop do not outlive a fork: each process has its own.
    _stores: dict[tuple[int, str], Store] = field(default_factory=dict, repr=False, compare=False)

    def stat(self, name: str) -> Stat:
        """Size and version of an object as it is now."""
        return self._run(name, self._stat(name))

    def stats(self, names: Sequence[str]) -> list[Stat]:
        """stat() of many objects."""
        return self._run(names[0], _together(map(self._stat, names))) if names else []

    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, up to IN_FLIGHT of them asked for at once."""
        return self._run(wanted[0].name, _together(map(self._get, wanted))) if wanted else []

    def find(self, pattern: str) -> dict[str, Stat]:
        """By name, the objects that a pattern matches, in order of the names for each of its braces."""
        check(pattern)
        shown = public(pattern)
        if shown != pattern and _is_glob(shown):
            raise DataError(
                f"{shown}: a glob with a password; needed: the names, as in train-{{000..123}}.tar"
            )
        return self._run(shown, self._find(shown))

    def ask(self, name: str, what: str, request: Callable[[Store], Awaitable[T]], *, patience: int = 1) -> T:
        """The answer to a request to the store of `name`, tried again like the others. what: it asks for.
        patience: how many times longer than another one it may take."""
        store = self._store(name)
        limits = replace(self.limits, timeout_s=self.limits.timeout_s * patience)
        return self._run(name, persist(what, lambda: request(store), limits, self.warn))

    def ask_all(self, name: str, what: str, requests: Sequence[Callable[[Store], Awaitable[T]]]) -> list[T]:
        """ask() of many, up to IN_FLIGHT of them at once."""
        store = self._store(name)

        def one(request: Callable[[Store], Awaitable[T]]) -> Coroutine[Any, Any, T]:
            return self._persist(what, lambda: request(store))

        return self._run(name, _together(map(one, requests)))

    def _store(self, name: str) -> Store:
        key = (os.getpid(), scheme_of(name))
        if key not in self._stores:
            self._stores[key] = open_store(key[1])
        return self._stores[key]

    def _run(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which has its own time limits, from the loop of a store's thread."""
        try:
            loop = self._store(name).loop
        except BaseException:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except (KeyboardInterrupt, SystemExit, CancelledError):
            future.cancel()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}  # another process opens its own

    async def _persist(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        return await persist(what, attempt, self.limits, self.warn)

    async def _stat(self, name: str) -> Stat:
        store, url = self._store(name), self.secrets.get(name, name)
        return await self._persist(name, lambda: store.stat(url))

    async def _get(self, wanted: Range) -> bytes:
        name, version, offset, size = wanted
        store, url = self._store(name), self.secrets.get(name, name)
        if not size:
            return b""

        async def attempt() -> bytes:
            got = await store.get(url, offset, size, version)
            if len(got) != size:
                raise Short(f"{len(got)} of {size} bytes came")
            return got

        return await self._persist(f"bytes {offset}-{offset + size} of {name}", attempt)

    async def _find(self, pattern: str) -> dict[str, Stat]:
        found: dict[str, Stat | None] = {}
        names = list(braceexpand.braceexpand(pattern))
        store = self._store(pattern)
        listed: dict[str, Stat | None] = {}
        before, _, after = pattern.partition("{")
        if len(names) > LISTED and not ("/" in after or _is_glob(pattern) or pattern.startswith("http")):
            listed = await self._persist(f"the list of {before}*", lambda: store.find(f"{before}*"))
        for name in names:
            if _is_glob(name):
                found |= await self._persist(f"the list of {name}", partial(store.find, name))
            elif not listed or name in listed:
                found[name] = listed.get(name)
        unknown = [name for name, stat in found.items() if stat is None]
        answers = await _together(map(self._stat_if_there, unknown))
        known = dict(zip(unknown, answers, strict=True))
        both = {name: stat or known.get(name) for name, stat in found.items()}
        return {name: stat for name, stat in both.items() if stat is not None}

    async def _stat_if_there(self, name: str) -> Stat | None:
        try:
            return await self._stat(name)
        except FileNotFoundError:
            return None

    def stream(self, name: str, stat: Stat) -> Iterator[tuple[int, bytes]]:
        """An object from its beginning to its end, as (offset, bytes), read once."""
        chunks = [
            Range(name, stat.version, at, min(CHUNK, stat.size - at)) for at in range(0, stat.size, CHUNK)
        ]
        for k in range(0, len(chunks), AHEAD):
            some = chunks[k : k + AHEAD]
            yield from zip((chunk.offset for chunk in some), self.read(some), strict=True)


def _is_glob(name: str) -> bool:
    return any(letter in name for letter in ("*[" if name.startswith("http") else "*?["))


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order, at most IN_FLIGHT under way; the first error ends the others."""
    free = asyncio.Semaphore(IN_FLIGHT)

    async def one(part: Coroutine[Any, Any, T]) -> T:
        async with free:
            return await part

    tasks = [asyncio.ensure_future(one(part)) for part in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
