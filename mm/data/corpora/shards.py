"""A corpus as shards: tars of bounded size with an index each, and a page on licences beside them."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.data.building import kept_indexes

PER_SHARD = 1000  # samples
WrittenSample = dict[
    str, bytes | str
]  # "__key__", "json" and parts by name, as webdataset's TarWriter takes it


@dataclass(frozen=True)
class Made:
    """What a recipe has written."""

    shards: Sequence[Path]
    summary: str  # how much there is, what is left out and why


def sample(key: str, segments: Sequence[Mapping[str, object]], parts: dict[str, bytes]) -> WrittenSample:
    """A sample of segments and the parts that they name. Dots in the key become dashes: one would end it."""
    text = json.dumps({"segments": segments}, ensure_ascii=False)
    return {"__key__": key.replace(".", "-"), **parts, "json": text.encode()}


def write_shards(out: Path, name: str, samples: Iterable[WrittenSample]) -> list[Path]:
    """Write NAME-000000.tar, NAME-000001.tar, .. with their indexes; none where there are no samples."""
    shards: list[Path] = []
    rest = iter(samples)
    for number in itertools.count():
        first = next(rest, None)
        if first is None:
            return shards
        chunk = itertools.chain([first], itertools.islice(rest, PER_SHARD - 1))
        shards.append(write_shard(out / f"{name}-{number:06d}.tar", chunk))
    raise AssertionError("itertools.count has no end")


def write_shard(path: Path, samples: Iterator[WrittenSample]) -> Path:
    """One shard with its index. It has its name when it is complete."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # Plain ustar headers: extended ones would add a kilobyte to every small file.
    with TarWriter(str(part), mtime=0, user="polyrank", group="polyrank", format=tarfile.USTAR_FORMAT) as tar:
        for one in samples:
            tar.write(one)
    os.replace(part, path)
    kept_indexes([str(path)])
    return path
