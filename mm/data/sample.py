"""What a sample is: as its json in a shard has it, and as a run uses it.

A sample is `KEY.json` with its parts `KEY.img0.png`, `KEY.aud0.wav`, .. in a WebDataset tar. The json gives
their order:

    {"segments": [{"vision": "img0.png"}, {"text": "sees "}, {"text": "3", "depends": "vision"}]}

A segment is either text or an item of a module. Text may have "loss": false, and "depends": the module that
its tokens depend on. A json may have a conversation instead (mm/data/conversation.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

DEEPEST = 64  # lists and objects inside each other in a sample's json: errors and templates recurse into them
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape of half of a surrogate pair


@dataclass(frozen=True)
class Part:
    """One payload of a sample."""

    shard: str  # path of the tar
    name: str  # after the key: "json", "img0.png"
    offset: int  # of the payload's first byte in the tar
    size: int  # bytes
    sha256: str  # of the payload
    meta: Mapping[str, int]  # what the probe of its extension reads: sizes


@dataclass(frozen=True)
class Segment:
    """Text, or an item of a module."""

    kind: str  # "text", or the module of the item
    tokens: int  # of text that is used; 0 for an item
    part: Part | None  # of an item; None for text
    loss: bool  # whether text is learned
    depends: str | None  # module that the text depends on
    written: int | None = None  # of truncated text, its tokens in the json; None where it is whole
    ids: tuple[int, ...] | None = None  # of text between pieces of an item, which is not in the json
    more: bool = False  # whether the next segment is of the same item


def grouped(segments: Sequence[Segment]) -> list[tuple[Segment, ...]]:
    """Segments, those of one item together."""
    out: list[tuple[Segment, ...]] = []
    goes_on = False
    for seg in segments:
        if goes_on:
            out[-1] = (*out[-1], seg)
        else:
            out.append((seg,))
        goes_on = seg.more
    return out


@dataclass(frozen=True)
class Sample:
    """One training sequence."""

    id: int  # counts over all shards of a data set, in order
    key: str
    shard: str
    segments: tuple[Segment, ...]
    json: Part
    truncated: bool = False  # only its beginning is used, so its end marker is not learned
    markers: bool = True  # a begin and an end marker are put around it; not where a chat template writes them
    source: str = ""  # the data set that it is of (mm/data/sources.py)

    def items(self, module: str) -> tuple[Part, ...]:
        """The sample's items of a module, in order."""
        return tuple(s.part for s in self.segments if s.part is not None and s.kind == module)


class Broken(NamedTuple):
    """A sample, or a part of a shard, that cannot be indexed."""

    shard: str
    key: str  # of the sample; "" where it is unknown
    why: str


class Skipped(NamedTuple):
    """Why the config leaves a sample out."""

    kind: Literal["misfit", "overlong"]
    why: str  # with the sample's name


@dataclass(frozen=True)
class Index:
    """The samples of a data set, and what of it cannot be read."""

    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...]
    shards: tuple[str, ...] = ()  # all of them in order, also those without a sample
    torn: tuple[str, ...] = ()  # shards that end before their end mark
    ignored: Mapping[str, int] = field(default_factory=dict)  # by shard, files whose names make no sample
    skipped: Mapping[int, Skipped] = field(default_factory=dict)  # by id, samples that the config leaves out

    @property
    def usable(self) -> list[Sample]:
        """The samples that are not left out."""
        return [s for s in self.samples if s.id not in self.skipped]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the samples' keys and jsons. It does not depend on the paths of the shards."""
        h = hashlib.sha256()
        for sample in self.samples:
            h.update(f"{sample.key} {sample.json.sha256}\n".encode())
        return h.hexdigest()[:16]


@dataclass(frozen=True)
class WrittenSegment:
    """A segment as the json has it."""

    kind: str  # "text", or the module of an item
    text: str | None  # None for an item
    name: str  # of the item's part; "" for text
    loss: bool
    depends: str | None


def parse_segments(payload: bytes) -> list[WrittenSegment]:
    """The segments of a sample's json; raises ValueError with what is wrong with it."""
    return segments_of(load_json(payload))


def load_json(payload: bytes) -> Any:
    """A sample's json; raises ValueError where it is none, is not UTF-8, has a key twice, half of a surrogate
    pair, or is nested more than DEEPEST times."""
    try:
        data = json.loads(payload.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"its json is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json cannot be read ({error})") from error
    if payload.count(b"[") + payload.count(b"{") > DEEPEST and _depth(data) > DEEPEST:
        raise ValueError(f"its json is nested more than {DEEPEST} times")
    if HALF.search(payload):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("its json has half of a surrogate pair, which is no text") from error
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a json; Python would silently keep the last of two values of one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == k for k, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _depth(data: Any) -> int:
    """How often lists and objects are nested; at most one more than DEEPEST is counted."""
    level, depth = [data], 0
    while level and depth <= DEEPEST:
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level = [y for x in inner for y in x]
        depth += bool(level)
    return depth


def segments_of(data: Any) -> list[WrittenSegment]:
    """The segments of a sample's json, loaded; raises ValueError with what is wrong with it."""
    try:
        written = data["segments"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"its json has no list of segments ({error})") from error
    if not isinstance(written, list):
        raise ValueError(f"its json has no list of segments (they are {written!r:.80})")
    return [_parse_segment(i, seg) for i, seg in enumerate(written)]


def _parse_segment(i: int, seg: object) -> WrittenSegment:
    kinds = list(seg) if isinstance(seg, dict) else []
    if len(kinds) > 1:  # a module of its own may be called loss or depends
        kinds = [k for k in kinds if k not in ("loss", "depends")]
    if not isinstance(seg, dict) or len(kinds) != 1 or not isinstance(seg[kinds[0]], str):
        raise ValueError(f"segment {i} is {seg!r}; needed: one of text or a module, with a string")
    kind, value = kinds[0], seg[kinds[0]]
    marks = {k: v for k, v in seg.items() if k != kind}
    loss, depends = marks.get("loss", True), marks.get("depends")
    if not isinstance(loss, bool) or not isinstance(depends, str | None):
        needed = "loss true or false, depends the name of a module"
        raise ValueError(f"segment {i} has loss {loss!r}, depends {depends!r}; needed: {needed}")
    if kind == "text":
        return WrittenSegment(kind, value, "", loss, depends)
    return WrittenSegment(kind, None, value, loss, depends)
