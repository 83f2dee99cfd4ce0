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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray


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
    json: Part  # its text part, whatever its ending
    truncated: bool = False  # only its beginning is used, so its end marker is not learned
    markers: bool = True  # a begin and an end marker are put around it; not where a chat template writes them
    source: str = ""  # the data set that it is of (mm/data/sources.py)
    layout: str = "segments"  # how its text part is written (mm/data/layouts)
    names: tuple[str, ...] = ()  # of its items' payloads as indexed, each once, for its layout

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


class Tally(NamedTuple):
    """Samples that are not left out, by shard, int64 [shards]. truncated: those of which only a beginning is
    used. items: by module that has some, in alphabetical order."""

    samples: NDArray[np.int64]
    truncated: NDArray[np.int64]
    items: Mapping[str, NDArray[np.int64]]


class Usable(Sequence[Sample]):
    """The samples that are not left out, in order. skipped: ids of the others, ascending."""

    def __init__(self, samples: Sequence[Sample], skipped: Iterable[int]) -> None:
        self._samples = samples
        gone = np.fromiter(skipped, dtype=np.int64)
        self._before = gone - np.arange(len(gone))  # by sample that is left out, how many usable come before

    def __len__(self) -> int:
        return len(self._samples) - len(self._before)

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Sample]: ...
    def __getitem__(self, which: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(which, slice):
            return [self[k] for k in range(len(self))[which]]
        nth = range(len(self))[which]
        return self._samples[nth + int(np.searchsorted(self._before, nth, side="right"))]

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Sequence) and len(other) == len(self)
        return same and all(a == b for a, b in zip(self, other, strict=True))  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment]  # as of any sequence that is compared by its elements


@dataclass(frozen=True)
class Index:
    """The samples of a data set, and what of it cannot be read."""

    samples: Sequence[Sample]
    broken: tuple[Broken, ...]
    shards: tuple[str, ...] = ()  # all of them in order, also those without a sample
    torn: tuple[str, ...] = ()  # shards that end before their end mark
    ignored: Mapping[str, int] = field(default_factory=dict)  # by shard, files whose names make no sample
    skipped: Mapping[int, Skipped] = field(default_factory=dict)  # by id, samples that the config leaves out

    tally: Tally | None = field(default=None, compare=False)  # where select() has counted

    @property
    def usable(self) -> Sequence[Sample]:
        """The samples that are not left out."""
        return Usable(self.samples, sorted(self.skipped))

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the samples' keys and jsons. It does not depend on the paths of the shards."""
        h = hashlib.sha256()
        lines = getattr(self.samples, "fingerprints", None)
        if lines is not None:  # columns, without views
            for part in lines():
                h.update(part)
            return h.hexdigest()[:16]
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
    """A sample's json; raises ValueError where it is none."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json has no list of segments ({error})") from error


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
