"""Ranges of remote shards in random order, from a web server on this machine that answers late.

    python -m benchmarks.data.remote [--latency 0.05] [--items 512] [--flights 1 4 16]

Items of about 100 KB (log-normal, as pictures are) of one data set, each read once an epoch, in a new order.

First table: reads that are asked for together, without a cache. Items a second, MB a second, their share of
what the same ranges of a local file give, whose pages are in memory, and of flights / latency.

Second table: the size of the cache as a share of the data set; by epoch the share of items that needed no
request, and the bytes that were asked for, as a multiple of the bytes that were used.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks import common
from mm.data.remote.client import Client, Range
from mm.data.remote.shards import RemoteShards
from tests.mm.data.remote.server import files, serving

Item = tuple[int, int]  # offset, size
PATH = "/shard.tar"
SHARES = (0.25, 0.5, 1.0, 1.25)
EPOCHS = 3


def _serve(folder: str, latency: float, pipe: Connection) -> None:
    with serving(files({PATH: (Path(folder) / "shard.tar").read_bytes()})) as server:
        server.delay_s = latency
        pipe.send(server.url)
        pipe.recv()


@contextmanager
def server_of(folder: Path, latency: float) -> Iterator[str]:
    """The URL of a folder's shard, served by another process, each answer `latency` seconds late."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(str(folder), latency, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv() + PATH
    finally:
        ours.send("end")
        process.join(10)


def make(folder: Path, count: int, seed: int = 0) -> list[Item]:
    """Write a shard of `count` items; returns where they are."""
    draw = np.random.default_rng(seed)
    sizes = np.clip(draw.lognormal(np.log(90_000), 0.5, count), 1_000, None).astype(np.int64)
    ends = np.cumsum(sizes)
    (folder / "shard.tar").write_bytes(draw.bytes(int(ends[-1])))
    return list(zip((ends - sizes).tolist(), sizes.tolist(), strict=True))


def seconds(read: object, items: Sequence[Item], flights: int) -> float:
    """How long `read` takes for all items, `flights` of them at once."""
    assert callable(read)
    start = time.perf_counter()
    for k in range(0, len(items), flights):
        read(items[k : k + flights])
    return time.perf_counter() - start


def race(folder: Path, items: Sequence[Item], flights: Sequence[int], latency: float) -> None:
    """The first table."""
    total = sum(size for _, size in items)
    file = os.open(folder / "shard.tar", os.O_RDONLY)
    local = min(seconds(lambda own: [os.pread(file, n, at) for at, n in own], items, 1) for _ in range(3))
    print(f"{'in flight':>9} {'items/s':>9} {'MB/s':>7} {'of local':>9} {'of the bound':>12}")
    print(f"{'local':>9} {len(items) / local:9.0f} {total / local / 1e6:7.0f} {1:9.4f}")
    with server_of(folder, latency) as name:
        remote = RemoteShards.of(folder / "none", 0)
        for n in flights:
            own = items[: max(n, round(n * 4 / latency)) if latency else None]  # about four seconds
            took = seconds(lambda some: remote.read_many([(name, *one) for one in some]), own, n)
            rate, moved = len(own) / took, sum(size for _, size in own) / took / 1e6
            bound = rate / (n / latency) if latency else float("nan")
            print(
                f"{n:9} {rate:9.1f} {moved:7.1f} {rate * local / len(items):9.4f} {bound:12.2f}", flush=True
            )


class _Counted(Client):
    """A client that counts the bytes it asks for."""

    asked = 0

    def read(self, wanted: Sequence[Range]) -> list[bytes]:
        object.__setattr__(self, "asked", self.asked + sum(one.size for one in wanted))
        return super().read(wanted)


def caches(folder: Path, items: Sequence[Item]) -> None:
    """The second table."""
    total, draw = sum(size for _, size in items), np.random.default_rng(1)
    titles = "".join(f"{f'hits {k + 1}':>9} {f'bytes {k + 1}':>9}" for k in range(EPOCHS))
    print(f"{'cache':>9}{titles}")
    with server_of(folder, 0.0) as name:
        for share in SHARES:
            with tempfile.TemporaryDirectory() as kept:
                remote = RemoteShards.of(Path(kept), int(share * total))
                client = _Counted(remote.client.limits)
                remote = replace(remote, client=client)
                remote.find(name)
                row = f"{share:9.2f}"
                for _ in range(EPOCHS):
                    hits, before = 0, client.asked
                    for k in draw.permutation(len(items)).tolist():
                        known = client.asked
                        remote.read(name, *items[k])
                        hits += client.asked == known
                    row += f"{hits / len(items):9.2f} {(client.asked - before) / total:9.2f}"
                print(row, flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each answer")
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--flights", type=int, nargs="+", default=[1, 4, 16])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        items = make(Path(folder), given.items)
        race(Path(folder), items, given.flights, given.latency)
        caches(Path(folder), items)


if __name__ == "__main__":
    main()
