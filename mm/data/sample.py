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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 64  # views that are made together where all are looked at
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
    first: int = 0  # of text that a portion has a part of, its tokens before that part


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


class Portion(NamedTuple):
    """What a sample is of a longer one that is split (mm/plan/truncate.py). nth: from 1 on. of: how many
    there are. texts: how many of the json's texts end before it."""

    nth: int
    of: int
    texts: int

    def __str__(self) -> str:
        return f"{self.nth} of {self.of}"


@dataclass(frozen=True)
class Sample:
    """One training sequence."""

    id: int  # counts over all shards of a data set, in order
    key: str
    shard: str
    segments: tuple[Segment, ...]
    json: Part  # its text part, whatever its ending
    truncated: bool = False  # more follows that is not in it, so its end marker is not learned
    markers: bool = True  # a begin and an end marker are put around it; not where a chat template writes them
    source: str = ""  # the data set that it is of (mm/data/sources.py)
    layout: str = "segments"  # how its text part is written (mm/data/layouts)
    names: tuple[str, ...] = ()  # of its items' payloads as indexed, each once: its layout may need them
    portion: Portion | None = (
        None  # of a longer sample; None where it is a whole one, or the beginning of one
    )

    @property
    def whole(self) -> bool:
        """Whether it has all that its json has."""
        return not self.truncated and self.portion is None

    @property
    def name(self) -> str:
        """Its key, and which portion of that it is."""
        return self.key if self.portion is None else f"{self.key} (portion {self.portion})"

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


class Selection(NamedTuple):
    """What an entry of the config takes of an index: samples first .. first + size - 1; bits: which of them,
    one bit each (numpy.packbits), None for all."""

    name: str
    first: int
    size: int
    bits: NDArray[np.uint8] | None = None

    @property
    def ids(self) -> NDArray[np.int64]:
        """The samples that are taken."""
        if self.bits is None:
            return np.arange(self.first, self.first + self.size)
        return self.first + np.flatnonzero(np.unpackbits(self.bits, count=self.size))


class Tally(NamedTuple):
    """Usable samples by shard, int64 [shards].

    A portion counts as a sample. truncated: those of which only the beginning is used. portions: those that
    are portions, and split: of how many samples. items: by module that has some, in alphabetical order.
    """

    samples: NDArray[np.int64]
    truncated: NDArray[np.int64]
    split: NDArray[np.int64]
    portions: NDArray[np.int64]
    items: Mapping[str, NDArray[np.int64]]


class ShardSums(NamedTuple):
    """Digests of what a shard has. texts: of keys and text parts; parts: of all parts."""

    name: str  # of its file
    samples: int
    texts: str
    parts: str


class Views(Sequence[Sample], ABC):
    """Samples that are made when they are asked for. Equal ones are equal, but not the same object."""

    @abstractmethod
    def views(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples with these numbers, from 0 on, made together."""

    def view(self, number: int) -> Sample:
        """Sample number `number`, from 0 on."""
        return self.views([number])[0]

    @overload
    def __getitem__(self, which: int) -> Sample: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[Sample]: ...
    def __getitem__(self, which: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(which, slice):
            return tuple(self.views(range(len(self))[which]))
        return self.view(range(len(self))[which])

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), AT_ONCE):
            yield from self.views(range(start, min(start + AT_ONCE, len(self))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of any sequence that is compared by its elements


def views_of(samples: Sequence[Sample], numbers: Sequence[int]) -> list[Sample]:
    """The samples with these numbers, made together where they are views."""
    return samples.views(numbers) if isinstance(samples, Views) else [samples[n] for n in numbers]


class Usable(Views):
    """Samples without some of them, in order. taken: ids, None for all. skipped: ids of those without."""

    def __init__(
        self, samples: Sequence[Sample], taken: NDArray[np.int64] | None, skipped: Iterable[int]
    ) -> None:
        gone = np.fromiter(skipped, dtype=np.int64)
        self._samples = samples
        self._taken = None if taken is None else taken[~np.isin(taken, gone)]
        # By sample that is left out, how many usable ones come before it.
        self._before = np.sort(gone) - np.arange(len(gone))

    @property
    def ids(self) -> NDArray[np.int64]:
        """Those that are left."""
        if self._taken is not None:
            return self._taken
        nth = np.arange(len(self))
        return nth + np.searchsorted(self._before, nth, side="right")

    def __len__(self) -> int:
        return len(self._samples) - len(self._before) if self._taken is None else len(self._taken)

    def views(self, numbers: Sequence[int]) -> list[Sample]:
        nth = np.asarray(numbers, dtype=np.int64)
        if self._taken is not None:
            found = self._taken[nth]
        else:
            found = nth + np.searchsorted(self._before, nth, side="right")
        return views_of(self._samples, found.tolist())


@dataclass(frozen=True)
class Index:
    """The samples of a data set, and what of it cannot be read."""

    samples: Sequence[Sample]
    broken: tuple[Broken, ...]
    shards: tuple[str, ...] = ()  # all of them in order, also those without a sample
    torn: tuple[str, ...] = ()  # shards that end before their end mark
    ignored: Mapping[str, int] = field(default_factory=dict)  # by shard, files whose names make no sample
    skipped: Mapping[int, Skipped] = field(default_factory=dict)  # by id, samples that the config leaves out
    firsts: tuple[int, ...] = ()  # by shard and at the end, the id of its first sample
    selections: tuple[Selection, ...] = ()  # by entry of the config; none: all samples
    # By entry of data.lengths and selection (none: all samples), a bit for each sample that is short enough.
    short: tuple[tuple[NDArray[np.uint8], ...], ...] = field(default=(), compare=False)
    tally: Tally | None = field(default=None, compare=False)  # where select() has counted
    _digests: dict[tuple[int, int], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def usable(self) -> Usable:
        """The samples that are taken and not left out, in order."""
        taken = np.concatenate([s.ids for s in self.selections]) if self.selections else None
        return Usable(self.samples, taken, self.skipped)

    def digest_of(self, first: int, stop: int) -> str:
        """A fingerprint of the keys and jsons of samples first .. stop - 1; it does not depend on paths.

        O(stop - first) the first time: each save of a run asks for the same ones.
        """
        if (first, stop) not in self._digests:
            self._digests[first, stop] = self._digest_of(first, stop)
        return self._digests[first, stop]

    def _digest_of(self, first: int, stop: int) -> str:
        h = hashlib.sha256()
        lines = getattr(self.samples, "fingerprints", None)
        if lines is not None:  # columns, without views
            for part in lines(first, stop):
                h.update(part)
            return h.hexdigest()[:16]
        for sample in self.samples[first:stop]:
            h.update(f"{sample.key} {sample.json.sha256}\n".encode())
        return h.hexdigest()[:16]

    @cached_property
    def digest(self) -> str:
        """digest_of() all samples."""
        return self.digest_of(0, len(self.samples))


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
