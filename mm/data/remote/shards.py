"""Remote shards as the rest of the data path reads them: by name, with what is read kept on a local disk.

Samples come in an order that is shuffled over the whole data set, so no byte is wanted more than another. The
most that a cache spares is then its share of the data set, and one that keeps what was used last spares less:
what it has is gone before its turn comes again. So as much of the data set is kept as fits, chosen by a hash,
in stretches of REGION bytes. Reads that begin there are of whole blocks, which stay. All others are of the
bytes that are wanted and no more, and nothing of them stays.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mm.data.remote.cache import BLOCK, BlockCache, block_key
from mm.data.remote.client import CHUNK, Client, Range
from mm.data.remote.retry import Limits
from mm.data.remote.stores import Stat
from mm.data.remote.urls import secrets_of

REGION = 1 << 20  # bytes: more than most items, less than a shard
FULL = 0.9  # of the cache: blocks have WAYS places each, so that a few find none before all are taken


@dataclass(frozen=True)
class RemoteShards:
    """Reads ranges of remote objects. Threads may share it, and processes forked from this one.

    folder: of the cache and of index files. Raises OSError for one object, Unreachable where a store does not
    answer.
    """

    client: Client
    cache: BlockCache
    folder: Path
    _stats: dict[str, Stat] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # "bytes", of all shards

    @staticmethod
    def of(
        folder: Path,
        cache_bytes: int,
        *,
        patterns: Iterable[str] = (),
        limits: Limits | None = None,
        warn: Callable[[str], object] = print,
    ) -> RemoteShards:
        """patterns: of the config, whose passwords and signatures go into requests and nowhere else."""
        client = Client(limits or Limits(), secrets_of(patterns), warn)
        return RemoteShards(client, BlockCache(folder, cache_bytes, warn), folder)

    def find(self, pattern: str) -> list[str]:
        """Names of the objects that a pattern matches."""
        found = self.client.find(pattern)
        self._stats.update(found)
        self._found["bytes"] = sum(stat.size for stat in self._stats.values())
        return list(found)

    def keeps(self, name: str, offset: int) -> bool:
        """Whether a read that begins at this offset goes through the cache."""
        total = max(self._found.get("bytes", 0), 1)
        share = FULL * self.cache.limit / total
        if share >= 1 or not self.cache.sets:
            return bool(self.cache.sets)
        key = block_key(name, self.stat(name).version, -1 - offset // REGION)
        return int.from_bytes(key[8:], "little") < share * 2**64

    def stat(self, name: str) -> Stat:
        """Size and version of an object, as this process met it first: one request."""
        if name not in self._stats:
            self._stats[name] = self.client.stat(name)
        return self._stats[name]

    def sidecars(self, name: str) -> Path:
        """The folder for files about the shards of a URL's folder, such as their indexes; it is made."""
        place = name.rpartition("/")[0]
        folder = self.folder / "index" / hashlib.sha256(place.encode()).hexdigest()[:24]
        with suppress(OSError):  # what cannot be written is not kept
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "url").write_text(place + "\n")
        return folder

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of an object; fewer where it ends before."""
        return self.read_many([(name, offset, size)])[0]

    def read_many(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """read() of many (name, offset, size) at once: what the cache lacks is asked for together."""
        kept = [self.keeps(name, offset) for name, offset, _ in wanted]
        blocks = [key for one, k in zip(wanted, kept, strict=True) if k for key in self._keys(*one)]
        found, missing = self._cached(blocks)
        exact = [self._range(*one) for one, k in zip(wanted, kept, strict=True) if not k]
        got = self.client.read([*exact, *missing])
        for run, data in zip(missing, got[len(exact) :], strict=True):
            found |= {(run.name, n): block for n, block in self._keep(run.name, run.offset, data)}
        others = iter(got)
        return [self._part(found, *one) if k else next(others) for one, k in zip(wanted, kept, strict=True)]

    def _part(self, blocks: dict[tuple[str, int], bytes], name: str, offset: int, size: int) -> bytes:
        """A range out of its blocks."""
        data = b"".join(blocks[key] for key in self._keys(name, offset, size))
        return data[offset % BLOCK : offset % BLOCK + size]

    def _range(self, name: str, offset: int, size: int) -> Range:
        stat = self.stat(name)
        return Range(name, stat.version, offset, max(0, min(size, stat.size - offset)))

    def _keys(self, name: str, offset: int, size: int) -> Iterator[tuple[str, int]]:
        """The blocks that a range touches, as (name, number)."""
        size = self._range(name, offset, size).size
        return ((name, n) for n in range(offset // BLOCK, -(-(offset + size) // BLOCK) if size else 0))

    def _cached(self, wanted: Iterable[tuple[str, int]]) -> tuple[dict[tuple[str, int], bytes], list[Range]]:
        """The blocks that are kept, and ranges of the others: blocks in a row are one, up to CHUNK bytes."""
        found: dict[tuple[str, int], bytes] = {}
        runs: list[tuple[str, int, int]] = []  # (name, first block, blocks)
        for name, n in sorted(set(wanted)):
            stat = self.stat(name)
            kept = self.cache.get(block_key(name, stat.version, n), min(BLOCK, stat.size - n * BLOCK))
            if kept is not None:
                found[name, n] = kept
            elif runs and runs[-1][0] == name and sum(runs[-1][1:]) == n and runs[-1][2] < CHUNK // BLOCK:
                runs[-1] = (name, runs[-1][1], runs[-1][2] + 1)
            else:
                runs.append((name, n, 1))
        return found, [self._range(name, n * BLOCK, count * BLOCK) for name, n, count in runs]

    def _keep(self, name: str, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Keep the blocks of bytes that begin at a block's offset, as (number, block)."""
        version = self.stat(name).version
        for at in range(0, len(data), BLOCK):
            n, block = (offset + at) // BLOCK, data[at : at + BLOCK]
            self.cache.put(block_key(name, version, n), block)
            yield n, block

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A copy of an object on the local disk, for a scan: read once, gone at the end.

        What is read goes into the cache too, as far as it has room.
        """
        stat = self.client.stat(name)  # as it is now, not as it was when it was met first
        self._stats[name] = stat
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="scan-") as file:
            for at, data in self.client.stream(name, stat):
                file.write(data)
                for k in range(0, len(data), REGION):
                    if self.keeps(name, at + k):
                        list(self._keep(name, at + k, data[k : k + REGION]))
            file.flush()
            yield Path(file.name)
