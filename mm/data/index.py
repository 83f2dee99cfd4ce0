"""The index of a data set: for each shard a file beside it, with the offset of every payload.

A shard is indexed once. Its index file records what made it: for another format, another probe or another
shard it is made again. Text stays in the tar; the index has only its length, in bytes. Lengths in tokens are
in files of their own (mm/data/tokens.py).
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import braceexpand

from mm.data.encode import NO_TEMPLATE
from mm.data.probes import known
from mm.data.probes import register_probe as register_probe  # documented here for users
from mm.data.published import PublishedTokenizer
from mm.data.sample import Broken, Index, Part, Sample, Segment
from mm.data.scan import VERSION, SampleEntry, SegmentEntry, ShardIndex, build_index, headers_digest
from mm.data.sources import source_names
from mm.data.tokenizer import AnyTokenizer
from mm.data.tokens import load, read_or_encode, store
from mm.errors import DataError


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def stored_index(shard: Path) -> ShardIndex | None:
    """The index beside a shard; None where it is missing, damaged, or of another shard, format or probe."""
    found = load(index_path(shard))
    try:
        index = cast(ShardIndex, found)
        return index if found is not None and _is_of(index, shard) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
    store(index_path(shard), index)
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
    patterns: Sequence[str],
    base: Path,
    *,
    tokenizer: AnyTokenizer | None = None,
    made_by: str | None = None,
    write: bool = True,
    names: Callable[[Sequence[str]], Sequence[str]] = source_names,
) -> Index:
    """The data set of the shards that the patterns match.

    tokenizer: in whose tokens lengths are; None: bytes. write: store new index files beside the shards.
    made_by: as in find_shards. names: of the data sets that shards are of, by shard.
    Raises DataError where a pattern matches nothing, a shard is compressed, or no sample is usable.
    """
    samples: list[Sample] = []
    broken: list[Broken] = []
    shards: list[str] = []
    torn: list[str] = []
    ignored: dict[str, int] = {}
    paths = find_shards(patterns, base, made_by)
    for path, source in zip(paths, names([str(path) for path in paths]), strict=True):
        shard, raw = str(path), read_or_build(path, write=write)
        shards.append(shard)
        torn += [shard] if raw["torn"] else []
        ignored[shard] = raw["ignored"]
        broken += [Broken(shard, key, why) for key, why in raw["broken"]]
        encoded: list[list[SegmentEntry] | str] | None = None
        if isinstance(tokenizer, PublishedTokenizer):
            encoded = read_or_encode(path, raw, tokenizer, write=write)
        for k, entry in enumerate(raw["samples"]):
            segments = _in_bytes(entry) if encoded is None else encoded[k]
            if isinstance(segments, str):
                broken.append(Broken(shard, entry["key"], segments))
            else:
                samples.append(_sample(len(samples), shard, source, entry, segments))
    if not samples:
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        raise DataError(f"no usable sample in {', '.join(patterns)}: {why or 'the shards are empty'}")
    return Index(tuple(samples), tuple(broken), tuple(shards), tuple(torn), ignored)


def _in_bytes(entry: SampleEntry) -> list[SegmentEntry] | str:
    """The segments of a sample in bytes, or why it has none."""
    return NO_TEMPLATE if entry.get("chat") else entry["segments"]


def _sample(
    number: int, shard: str, source: str, entry: SampleEntry, segments: Sequence[SegmentEntry]
) -> Sample:
    """A sample from its entry in the index of a shard. segments: in the lengths of the tokenizer."""
    parts = {
        name: Part(shard, name, p["offset"], p["size"], p["sha256"], p["meta"])
        for name, p in entry["parts"].items()
    }
    made = tuple(
        Segment(
            kind=s["kind"],
            tokens=s.get("tokens", s.get("bytes", 0)),
            part=parts[s["part"]] if "part" in s else None,
            loss=s.get("loss", True),
            depends=s.get("depends"),
        )
        for s in segments
    )
    markers = not entry.get("chat", False)
    return Sample(number, entry["key"], shard, made, parts["json"], markers=markers, source=source)
