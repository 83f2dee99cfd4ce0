"""The index of a data set: for each shard a file beside it, which says where every payload lies.

A shard is indexed once. Its index file records what made it: for another format, another probe or another
shard it is made again. Text stays in the tar; the index has only its length.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import braceexpand

from mm.data.probes import known
from mm.data.probes import register_probe as register_probe  # documented here for users
from mm.data.sample import Broken, Index, Part, Sample, Segment
from mm.data.scan import VERSION, SampleEntry, ShardIndex, build_index, headers_digest
from mm.errors import DataError


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def stored_index(shard: Path) -> ShardIndex | None:
    """The index beside a shard; None where it is missing, damaged, or of another shard, format or probe."""
    try:
        index = json.loads(index_path(shard).read_text())
        claimed = index.pop("sha256")
        return cast(ShardIndex, index) if claimed == _sum(index) and _is_of(index, shard) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _sum(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, separators=(",", ":")).encode()).hexdigest()


def _is_of(index: ShardIndex, shard: Path) -> bool:
    """Whether a scan of the shard would give this index now.

    A copy of a shard has another mtime: it counts as the same shard where all headers are equal. A payload
    that differs is found when it is read. Entries of a probe that is not registered here are accepted.
    """
    now = shard.stat()
    if index["version"] != VERSION or index["bytes"] != now.st_size:
        return False
    if any(known(e) not in (None, made) for e, made in index["probes"].items()):
        return False
    if index["mtime_ns"] == now.st_mtime_ns:
        return True
    return not index["broken"] and index["headers"] == headers_digest(shard, index["samples"])


def read_or_build(shard: Path, *, write: bool = True) -> ShardIndex:
    """The index of a shard, scanned where stored_index() has none; write: store a new one beside the shard.

    Raises DataError for a compressed file.
    """
    index = stored_index(shard)
    if index is not None:
        return index
    index = build_index(shard)
    if not write or not index["samples"]:
        return index  # the file may be no shard at all: leave nothing beside it
    # Ranks on several machines may write at the same time: the rename is atomic.
    path = index_path(shard)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_text(json.dumps({**index, "sha256": _sum(index)}, separators=(",", ":")))
        os.replace(partial, path)
    except OSError:  # a read-only data set still trains: it is scanned at each start
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return index


def find_shards(patterns: Sequence[str], base: Path, made_by: str | None = None) -> list[Path]:
    """The shards that globs and brace patterns (relative to base) match.

    made_by: the command that makes them, for the error. Raises DataError where a pattern matches nothing.
    """
    out: list[Path] = []
    for pattern in patterns:
        found = [
            Path(p) for one in braceexpand.braceexpand(pattern) for p in sorted(glob.glob(str(base / one)))
        ]
        if not found:
            folder = (base / pattern).parent
            have = sorted(p.name for p in folder.glob("*.tar")) if folder.is_dir() else None
            there = (
                "the folder does not exist" if have is None else f"it has {', '.join(have[:5]) or 'no tar'}"
            )
            hint = "" if made_by is None else f"; this makes it: {made_by}"
            raise DataError(f"no shard matches {pattern!r} in {folder}: {there}{hint}")
        out += found
    return out


def load_index(
    patterns: Sequence[str], base: Path, *, made_by: str | None = None, write: bool = True
) -> Index:
    """The data set of the shards that the patterns match.

    write: store new index files beside the shards. made_by: as in find_shards. Raises DataError where a
    pattern matches nothing, a shard is compressed, or no sample is usable.
    """
    samples: list[Sample] = []
    broken: list[Broken] = []
    shards: list[str] = []
    torn: list[str] = []
    ignored: dict[str, int] = {}
    for path in find_shards(patterns, base, made_by):
        shard, raw = str(path), read_or_build(path, write=write)
        shards.append(shard)
        torn += [shard] if raw["torn"] else []
        ignored[shard] = raw["ignored"]
        broken += [Broken(shard, key, why) for key, why in raw["broken"]]
        samples += [_sample(len(samples) + k, shard, entry) for k, entry in enumerate(raw["samples"])]
    if not samples:
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        raise DataError(f"no usable sample in {', '.join(patterns)}: {why or 'the shards are empty'}")
    return Index(tuple(samples), tuple(broken), tuple(shards), tuple(torn), ignored)


def _sample(number: int, shard: str, entry: SampleEntry) -> Sample:
    """A sample from its entry in the index of a shard."""
    parts = {
        name: Part(shard, name, p["offset"], p["size"], p["sha256"], p["meta"])
        for name, p in entry["parts"].items()
    }
    segments = tuple(
        Segment(
            kind=s["kind"],
            text_bytes=s.get("bytes", 0),
            part=parts[s["part"]] if "part" in s else None,
            loss=s.get("loss", True),
            depends=s.get("depends"),
        )
        for s in entry["segments"]
    )
    return Sample(number, entry["key"], shard, segments, parts["json"])
