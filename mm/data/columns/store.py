"""The tables of a folder: files beside its shards, that grow by new files and are joined now and then.

A file has the shards that were indexed together. A new one takes in those that are not much larger than it,
so that there are few, and one that is large is seldom written again. Names of files are sums of what they
hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mm.data.columns.file import content_of, read_file, write_file
from mm.data.columns.table import Spec, Table, join
from mm.data.storage import Say

GROWTH = 4  # a new file takes in those of up to so many times its bytes
SMALL = 1 << 20  # bytes of a file that is always taken in
LOCK_S = 600.0  # longest wait for another process that writes here
POLL_S = 0.2
TRIES = 10


@dataclass(frozen=True)
class Store:
    """The tables of one kind in a folder: of a spec, and of a tokenizer where it is texts' ("" else)."""

    folder: Path
    spec: Spec
    suffix: str  # of the files
    with_shards: bool = (
        True  # whether the shards lie there too: what is kept of those that are gone is left out
    )

    def tables(self) -> dict[Path, Table]:
        """By file, what it holds. Files that are damaged or of another format are left out."""
        for _ in range(TRIES):
            # A file that is gone has just been taken into a larger one by another process.
            with contextlib.suppress(FileNotFoundError):
                found = {path: read_file(path, self.spec) for path in self._files()}
                return {path: table for path, table in found.items() if table is not None}
        return {}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"shards-*.{self.suffix}"))

    def add(self, fresh: Table) -> bool:
        """Write a table's shards in place of older ones of equal names; False where the folder cannot be
        written. O(bytes of the files that it takes in)."""
        before, tables = self._files(), self.tables()
        names, parts, total = set(fresh.paths), [fresh], fresh.nbytes
        gone = [path for path in before if path not in tables]
        for path, table in sorted(tables.items(), key=lambda found: found[1].nbytes):
            live = [k for k, name in enumerate(table.paths) if name not in names]
            if table.nbytes > max(GROWTH * total, SMALL) and live:
                continue
            live = [k for k in live if not self.with_shards or (self.folder / table.paths[k]).exists()]
            names.update(table.paths)
            parts.insert(0, table.take(live))
            total += table.nbytes
            gone.append(path)
        content = content_of(join(parts))
        made = self.folder / f"shards-{name_of(content)}.{self.suffix}"
        if not write_file(made, content):
            return False
        for path in gone:
            if path != made:
                with contextlib.suppress(OSError):
                    path.unlink()
        return True


def name_of(content: list[bytes | memoryview]) -> str:
    """The beginning of the sum of a file's content."""
    # The first array of a file is the sum of its JSON, which has the sum of all that follows.
    return bytes(content[1][:6]).hex()


@contextmanager
def writing(folder: Path, say: Say, wait_s: float = LOCK_S) -> Iterator[None]:
    """Keep other processes of this machine from the same work in a folder while the block runs.

    They wait, at most wait_s seconds, and say for whom. It is a help and no more: files appear whole without
    it. Where the folder cannot be written, or locks are not supported, nobody waits. A lock ends with its
    process, however that ends.
    """
    path = folder / "shards.lock"
    file = _locked(path, say, wait_s)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            os.close(file)


def _locked(path: Path, say: Say, wait_s: float) -> int | None:
    """A lock file, open and locked; None where there can be none, or it was not free in time."""
    since, said = time.monotonic(), False
    while time.monotonic() - since < wait_s:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            if not said:
                say(f"waiting for {who}, which indexes {path.parent}")
                said = True
            time.sleep(POLL_S)
            continue
        except OSError:
            os.close(file)
            return None
        if _is_at(file, path):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return file
        os.close(file)  # who held it has removed it meanwhile
    return None


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False
