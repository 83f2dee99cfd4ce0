"""A store that a test can make fail: fsspec's memory file system behind a list of faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import fsspec
import pytest

from mm.data.remote import client
from mm.data.remote.stores import Stat, _Any

Fault = Callable[[bytes], bytes] | Exception | float  # alters an answer, is raised, or is a stall in seconds


class Faulty(_Any):
    """memory:// with conditions on the version, and the faults of a list before answers."""

    def __init__(self, faults: list[Fault | None], guard: AbstractContextManager[Any] | None = None) -> None:
        super().__init__("memory")
        self.faults, self.guard = faults, guard or nullcontext()
        self.asked: list[tuple[str, int, int]] = []
        self.flying = self.most = 0

    async def stat(self, url: str) -> Stat:
        return (await super().stat(url)) if not self.faults else await self._faulty(super().stat(url))

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        self.asked.append((url, offset, size))
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            await asyncio.sleep(0.001)
            return await self._faulty(super().get(url, offset, size, version))
        finally:
            self.flying -= 1

    async def _faulty(self, work: Any) -> Any:
        fault = self.faults.pop(0) if self.faults else None
        got = await work
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        return fault(got) if callable(fault) else got


def put(name: str, data: bytes) -> None:
    """Write an object of memory://."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file(name, data)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """The store that memory:// opens in this test."""
    fsspec.filesystem("memory").store.clear()
    store = Faulty([])
    monkeypatch.setattr(client, "open_store", lambda scheme: store)
    return store
