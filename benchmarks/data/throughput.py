"""Pictures a second, read and decoded by as many worker processes: this project's feed beside other loaders.

    PYTHONPATH=PEERS python -m benchmarks.data.throughput [--workers 2] [--pictures 2048] [--rounds 5]

PEERS: a folder with torchdata and mosaicml-streaming (benchmarks/README.md); loaders that are not there are
left out, and nothing else in the project needs them. webdataset comes with the project.

Equal for all: the JPEGs, made by the benchmark, of the encoder's size, in the page cache; how they are
decoded, ViT's prepare(), or prepare_into() where a loader has a place for what that gives, with equal values;
batches of float32 patches, of the same size; workers; two batches ahead a worker. Order of loaders is turned
round by round. A round is an epoch, shuffled. Its clock runs from batch number FIRST, when all workers are at
work, to the FIRST-last: at both ends as many batches lie ready as a loader holds, so none has work counted
that was done outside, and none is slowed by the end of an epoch.
Figures are medians over rounds: pictures a second, the feed's over each loader's of the same round,
processor time a picture, of all processes in the same time, and the cores that were at work. The feed does
more than the others: it plans the steps of a job, reads and packs their texts, checks each payload against
its sha256, and lets workers die. The tars have a text a picture; webdataset reads both, and decodes one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from benchmarks.data.made import config, feeding, jpegs, vit_options, write_tars
from encoders import compat
from encoders.registry import resolve

FIRST = 8  # batches before the clock runs, and after it has stopped
Batches = Iterator[Tensor]


class Decode:
    """A payload to its patches [n, 3 * patch * patch]."""

    def __init__(self, side: int) -> None:
        self.cls = resolve("vit")
        self.cfg = self.cls.Config(**vit_options(side))
        self.meta = {"height": side, "width": side, "channels": 3}

    def __call__(self, payload: bytes) -> Tensor:
        out: Tensor = self.cls.prepare(self.cfg, payload, self.meta)
        return out


class Files(Dataset[Tensor]):
    """A map data set over one file a picture."""

    def __init__(self, folder: Path, decode: Decode) -> None:
        self.files, self.decode = sorted(map(str, folder.iterdir())), decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.decode(Path(self.files[i]).read_bytes())


def write_formats(root: Path, pictures: Sequence[bytes]) -> None:
    """The pictures as tars, as files, and as MDS shards where streaming is there."""
    for name in ("tar", "files"):
        (root / name).mkdir()
    write_tars(root / "tar", pictures, shards=8)
    for i, picture in enumerate(pictures):
        (root / "files" / f"{i:06d}.jpg").write_bytes(picture)
    if there("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(root / "mds"), columns={"jpg": "bytes"}, size_limit=4 << 20) as writer:
            for picture in pictures:
                writer.write({"jpg": picture})


def there(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def tars(root: Path, decode: Decode, batch: int) -> Any:
    """A webdataset pipeline, as its documentation has it: shards and samples shuffled, decoded, batched."""
    import webdataset

    urls = sorted(map(str, (root / "tar").glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    return data.shuffle(100).map(lambda sample: decode(sample["i.jpg"])).batched(batch, torch.stack)


def mds(root: Path, decode: Decode, batch: int) -> Any:
    """A streaming data set over local shards."""
    from streaming import StreamingDataset

    class Pictures(StreamingDataset):  # type: ignore[misc]
        """Its samples, decoded."""

        def __getitem__(self, at: Any) -> Tensor:
            return decode(super().__getitem__(at)["jpg"])

    return Pictures(local=str(root / "mds"), shuffle=True, batch_size=batch)


def loaders(root: Path, decode: Decode, workers: int, batch: int) -> dict[str, Callable[[], Batches]]:
    """By name, what makes the batches of a round."""
    kept: dict[str, Any] = {"num_workers": workers, "persistent_workers": True, "prefetch_factor": 2}
    mapped: dict[str, Any] = {**kept, "batch_size": batch, "shuffle": True}
    own: dict[str, Any] = {**kept, "batch_size": None}
    found: dict[str, Callable[[], Batches]] = {
        "webdataset": lambda: iter(DataLoader(tars(root, decode, batch), **own)),
        "torch, files": lambda: iter(DataLoader(Files(root / "files", decode), **mapped)),
    }
    if there("torchdata"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        found["torchdata, webdataset"] = lambda: iter(StatefulDataLoader(tars(root, decode, batch), **own))
        files = Files(root / "files", decode)
        found["torchdata, files"] = lambda: iter(StatefulDataLoader(files, **mapped))
    if there("streaming"):
        found["mosaicml-streaming"] = lambda: iter(
            DataLoader(mds(root, decode, batch), batch_size=batch, **kept)
        )
    return found


def fed(root: Path, side: int, batch: int, steps: int, workers: int) -> Batches:
    """The batches of this project's feed."""
    with feeding(config(root / "tar", side, batch, workers=workers)) as feed:
        for step in range(steps):
            yield feed.next(step, steps)[0].micro[0].items["vision"].values


def clocked(batches: Batches, steps: int) -> tuple[float, float]:
    """Batches a second, and processor seconds a batch, between number FIRST and the FIRST-last of `steps`."""
    seen, last = {}, steps - FIRST
    for n, batch in enumerate(batches):
        _ = batch.view(-1)[0].item()
        if n in (FIRST, last):
            seen[n] = time.perf_counter(), processor_s()
    (begin, before), (end, after) = seen[FIRST], seen[last]
    count = last - FIRST
    return count / (end - begin), (after - before) / count


def processor_s() -> float:
    """Processor time of this process and of all below it."""
    parent, used = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            pid = int(entry.name)
            parent[pid], used[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {pid for pid, above in parent.items() if above in mine} - mine:
        mine |= more
    return sum(used[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    args = common.parser(__doc__)
    args.add_argument("--workers", type=int, default=2)
    args.add_argument("--pictures", type=int, default=2048)
    args.add_argument("--side", type=int, default=224)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--rounds", type=int, default=5)
    asked = args.parse_args()
    compat.repair()  # streaming imports torchvision
    torch.set_num_threads(1)
    decode = Decode(asked.side)
    root = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        pictures = list(jpegs(asked.pictures, asked.side))
        write_formats(root, pictures)
        size = sum(map(len, pictures)) / len(pictures) / 1e3
        steps = asked.pictures // asked.batch
        made = loaders(root, decode, asked.workers, asked.batch)
        ours = "this project"
        made[ours] = lambda: fed(root, asked.side, asked.batch, steps, asked.workers)
        rates: dict[str, list[float]] = {name: [] for name in made}
        costs: dict[str, list[float]] = {name: [] for name in made}
        names = list(made)
        for n in range(asked.rounds):
            for name in names[n % len(names) :] + names[: n % len(names)]:
                rate, cost = clocked(made[name](), steps)
                rates[name].append(rate * asked.batch)
                costs[name].append(cost / asked.batch)
        print(f"{asked.pictures} JPEGs of {asked.side} px, {size:.0f} kB each, {asked.workers} workers")
        print("| loader | pictures a second | ours over it | processor ms a picture | cores at work |")
        print("|---|---|---|---|---|")
        for name in names:
            ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[name], strict=True))
            rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
            print(f"| {name} | {rate:.0f} | {ratio:.2f} | {cost * 1e3:.2f} | {rate * cost:.2f} |")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
