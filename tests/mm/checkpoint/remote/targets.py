"""A target in a folder of this machine, whose requests a test counts and lets fail, and a run for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm.checkpoint.remote.copies import Copies, read_index
from mm.checkpoint.remote.fetch import read_manifest, verify
from mm.checkpoint.remote.index import RemoteIndex
from mm.config.schema import CheckpointConfig
from mm.data.remote.client import Client
from mm.data.remote.folder import Folder
from mm.data.remote.retry import Limits
from mm.data.remote.stores import Stat, _File
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from parallel.checkpoint.folder import publish, write_state

LIMITS = Limits(timeout_s=0.5, attempts=3, pause_s=0.001)
Fault = Callable[[str, str], object]  # of what is asked ("put", "get", ..) and of which URL; raises, or waits


class Killed(BaseException):
    """Stands for the end of a process: nothing after it is done."""


@dataclass
class Requests:
    """What was asked of a store, and what happens before each request."""

    asked: list[tuple[str, str]] = field(default_factory=list)
    fault: Fault = lambda what, url: None
    alter: Callable[[str, bytes], bytes] = lambda url, data: data  # of what is read

    def __call__(self, what: str, url: str) -> None:
        self.asked.append((what, url))
        self.fault(what, url)


class Watched(_File):
    """file:// with Requests."""

    def __init__(self, requests: Requests) -> None:
        super().__init__("file")
        self.requests = requests

    async def stat(self, url: str) -> Stat:
        self.requests("stat", url)
        return await super().stat(url)

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        self.requests("get", url)
        return self.requests.alter(url, await super().get(url, offset, size, version))

    async def put(self, url: str, data: bytes) -> None:
        self.requests("put", url)
        await super().put(url, data)

    async def in_parts(self, url: str) -> Any:
        self.requests("begin", url)
        return await super().in_parts(url)

    async def remove(self, url: str) -> None:
        self.requests("remove", url)
        await super().remove(url)

    async def below(self, url: str) -> dict[str, int]:
        self.requests("list", url)
        return await super().below(url)


@dataclass
class Target:
    """A run's folder and its target's."""

    run: Path
    there: Path
    requests: Requests
    folder: Folder

    def copies(self, session: str = "one", first: int = 0, run: str = "r", **rules: Any) -> Copies:
        remote = {"url": self.folder.url, **rules.pop("remote", {})}
        cfg = CheckpointConfig(**rules, remote=remote)
        return Copies(self.folder, self.run, cfg, run, session, first)

    def written(self, *steps: int, **metrics: float) -> None:
        """Checkpoints of the run, with bytes in the place of tensors."""
        for step in steps:
            partial = store.partial_of(self.run, step)
            partial.mkdir(parents=True)
            for n in range(2):
                (partial / f"__{n}_0.distcp").write_bytes(bytes([step]) * (500 + 100 * n))
            write_state(partial, step, {"metrics": metrics})
            entries = {p.name: manifest.entry_of(p) for p in partial.iterdir()}
            publish(partial, entries, store.newest(0))

    def lost(self, *steps: int) -> None:
        """Remove checkpoints of the run."""
        for step in steps:
            shutil.rmtree(self.run / f"step-{step:08d}")

    def index(self) -> RemoteIndex:
        found = read_index(self.folder)
        assert found is not None
        return found

    def folders(self) -> list[str]:
        """What there is, without what tells a copy from another one."""
        return sorted(p.name.partition(".")[0] for p in self.there.iterdir())

    def at(self, step: int) -> Path:
        """Where a checkpoint's files are."""
        return self.there / self.index().checkpoints[f"step-{step:08d}"].folder

    def steps(self) -> list[int]:
        """The steps of the target's checkpoints, each of which is whole."""
        index = self.index()
        for entry in index.checkpoints.values():
            out = self.there.parent / "manifest"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            assert verify(self.folder, entry, read_manifest(self.folder, entry, out)) == []
        return sorted(int(name.removeprefix("step-")) for name in index.checkpoints)


def all_of(copies: Copies) -> list[str]:
    """What is copied until all is, in order."""
    out = list[str]()
    while (name := copies.copy_one()) is not None:
        out.append(name)
    return out


def target_in(folder: Path) -> Target:
    """A target with a store of its own; run: of which nothing is there."""
    requests = Requests()
    there = folder / "there"
    client = Client(LIMITS, warn=lambda line: None)
    client = replace(client, _stores=_Stores(Watched(requests)))
    return Target(folder / "run", there, requests, Folder(f"file://{there}", client))


class _Stores(dict[Any, Any]):
    """The same store for every process and scheme."""

    def __init__(self, store: Watched) -> None:
        super().__init__()
        self._store = store

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> Watched:
        return self._store
