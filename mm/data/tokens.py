"""The token index of a shard: its segments in tokens, in a file beside it for each tokenizer.

It stands on the index of the shard, and on the tokenizer with its chat template. Where either is another, it
is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from mm.data.encode import TokenSegment, Written, encode_samples, parse_sample
from mm.data.published import PublishedTokenizer
from mm.data.scan import SampleEntry, SegmentEntry, ShardIndex, text_entry

BATCH_BYTES = 4 << 20  # of json that is encoded at once: enough for all cores, small beside a shard


class TokenIndex(TypedDict):
    """The content of a token index, without its own sum."""

    tokenizer: str  # key of the tokenizer
    shard: str  # sum of the shard's index
    samples: list[list[SegmentEntry] | str]  # by sample of that index, its segments or why it cannot be used


def tokens_path(shard: Path, tokenizer: PublishedTokenizer) -> Path:
    """Where the token index of a shard lies: beside it, with the beginning of the tokenizer's key."""
    return shard.with_name(f"{shard.name}.tokens-{tokenizer.key[:12]}.json")


def sum_of(content: Mapping[str, Any]) -> str:
    """The sha256 of what an index file holds."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def store(path: Path, content: Mapping[str, Any]) -> None:
    """Write an index file with its own sum, whole or not at all; a folder that cannot be written stays as it
    is, and its shards are read again at each start."""
    # Ranks on several machines may write at the same time: the rename is atomic.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        partial.write_text(json.dumps({**content, "sha256": sum_of(content)}, separators=(",", ":")))
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """The content of an index file; None where it is missing or damaged."""
    try:
        index = json.loads(path.read_text())
        claimed = index.pop("sha256")
        return cast(dict[str, Any], index) if claimed == sum_of(index) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_or_encode(
    shard: Path, index: ShardIndex, tokenizer: PublishedTokenizer, *, write: bool
) -> list[list[SegmentEntry] | str]:
    """By sample of a shard's index, its segments in tokens, or why it cannot be used.

    Every text is encoded where no file has that; write: store one.
    """
    path, of = tokens_path(shard, tokenizer), sum_of(index)
    found = load(path)
    if found is not None and (found.get("tokenizer"), found.get("shard")) == (tokenizer.key, of):
        return cast(TokenIndex, found)["samples"]
    samples: list[list[SegmentEntry] | str] = []
    with shard.open("rb") as tar:
        for batch in _batches(index["samples"]):
            samples += _encode(tar.fileno(), batch, tokenizer)
    if write and samples:
        store(path, TokenIndex(tokenizer=tokenizer.key, shard=of, samples=samples))
    return samples


def _batches(samples: Sequence[SampleEntry]) -> Iterator[list[SampleEntry]]:
    """Samples in order, in batches of about BATCH_BYTES of json."""
    batch: list[SampleEntry] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += text_entry(sample)["size"]
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    tar: int, samples: Sequence[SampleEntry], tokenizer: PublishedTokenizer
) -> list[list[SegmentEntry] | str]:
    written: list[Written] = []
    out: list[list[SegmentEntry] | str] = []
    for sample in samples:
        part, layout = text_entry(sample), sample.get("layout", "segments")
        names = tuple(s["part"] for s in sample["segments"] if "part" in s)
        try:
            payload = os.pread(tar, part["size"], part["offset"])
            written.append(parse_sample(payload, layout, sample.get("text", "json"), names))
            out.append("")
        except (OSError, ValueError) as error:  # it has changed since the shard was indexed
            out.append(str(error))
    found = iter(encode_samples(written, tokenizer))
    for i, why in enumerate(out):
        if not why:
            segments = next(found)
            out[i] = segments if isinstance(segments, str) else [_entry(seg) for seg in segments]
    return out


def _entry(seg: TokenSegment) -> SegmentEntry:
    if seg.ids is None:
        return {"kind": seg.kind, "part": seg.name}
    entry: SegmentEntry = {"kind": "text", "tokens": len(seg.ids)}
    if not seg.loss:
        entry["loss"] = False
    if seg.depends is not None:
        entry["depends"] = seg.depends
    return entry
