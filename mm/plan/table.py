"""Samples as columns: what the planner needs to know of each, worked out once and gathered for every step.

Encoders answer for one item at a time, in Python. A job asks them once for its whole data set, O(samples +
items); a step then takes its samples' entries from the columns, without a loop over samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm.data.sample import Index, Part, Sample, views_of
from mm.plan.fitted import Fitted
from mm.plan.inputs import PlanInputs, mtp_supervised_tokens, sample_length, supervised_tokens
from parallel.sequence.dealing import loads
from parallel.sequence.intervals import Column, before, repeat_groups

Costs = NDArray[np.float64]  # [n]


@dataclass(frozen=True)
class Items:
    """The items of one encoder, a line an item, in order of sample and then as they come in it.

    of: by sample, how many items it has. rows: that an item contributes. offset: of its first row among its
    sample's tokens. cost: in the encoder's own unit. content: a number from 0 on, equal where payloads are.
    """

    of: Column
    rows: Column
    offset: Column
    cost: Costs
    content: Column

    @cached_property
    def first(self) -> Column:
        """By sample, the index of its first item."""
        return before(self.of)

    @cached_property
    def cost_by_sample(self) -> Costs:
        """Sums of the costs of each sample's items."""
        return loads(self.cost, np.repeat(np.arange(len(self.of)), self.of), len(self.of))

    def take(self, which: Column) -> Items:
        """The items of the samples with these indices, in this order."""
        of = self.of[which]
        item = repeat_groups(self.first[which], of)[1]
        return Items(of, self.rows[item], self.offset[item], self.cost[item], self.content[item])


class _Found(NamedTuple):
    """An item; content: of _content()."""

    rows: int
    offset: int
    cost: float
    content: int


@dataclass(frozen=True)
class SampleTable:
    """Samples, a line a sample.

    samples, which: line j is samples[which[j]]. ids: of the samples. length, supervised: in tokens. mtp:
    supervised tokens at each depth of multi-token prediction, [depths, lines]. items: by encoder. sources:
    the data sets that samples are of, in alphabetical order. source: by line, the index of its own.
    """

    samples: Sequence[Sample]
    which: Column
    ids: Column
    length: Column
    supervised: Column
    mtp: Column
    items: Mapping[str, Items]
    sources: tuple[str, ...]
    source: Column
    _seen: dict[int, Sample] = field(default_factory=dict, compare=False, repr=False)  # views, by line
    _items: dict[tuple[int, str], tuple[Part, ...]] = field(default_factory=dict, compare=False, repr=False)
    _metas: dict[tuple[str, int], list[Any]] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(samples: Sequence[Sample], inputs: PlanInputs, skip: Collection[int] = ()) -> SampleTable:
        """The table of `samples`. skip: ids that are never drawn; their lines are empty. Raises DataError
        (sample_length)."""
        length, supervised, mtp = [], [], []
        found: dict[str, list[_Found]] = {m: [] for m in inputs.encoders}
        of: dict[str, list[int]] = {m: [] for m in inputs.encoders}
        for sample in samples:
            drawn = sample.id not in skip
            length.append(sample_length(sample, inputs) if drawn else 0)
            supervised.append(supervised_tokens(sample, inputs) if drawn else 0)
            mtp.append(mtp_supervised_tokens(sample, inputs) if drawn else [0] * inputs.mtp_depths)
            already = {m: len(items) for m, items in found.items()}
            if drawn:
                _append_items(sample, inputs, found)
            for m, n in already.items():
                of[m].append(len(found[m]) - n)
        sources, source = np.unique(np.asarray([s.source for s in samples], dtype=str), return_inverse=True)
        return SampleTable(
            samples=samples,
            which=np.arange(len(samples)),
            ids=np.asarray([s.id for s in samples], dtype=np.int64),
            length=np.asarray(length, dtype=np.int64),
            supervised=np.asarray(supervised, dtype=np.int64),
            mtp=np.asarray(mtp, dtype=np.int64).reshape(len(samples), inputs.mtp_depths).T,
            items={m: _items(of[m], found[m]) for m in inputs.encoders},
            sources=tuple(sources.tolist()),
            source=source.astype(np.int64),
        )

    def take(self, which: Column) -> SampleTable:
        """The samples with these indices, in this order."""
        return SampleTable(
            samples=self.samples,
            which=self.which[which],
            ids=self.ids[which],
            length=self.length[which],
            supervised=self.supervised[which],
            mtp=self.mtp[:, which],
            items={m: items.take(which) for m, items in self.items.items()},
            sources=self.sources,
            source=self.source[which],
            _metas=self._metas,
        )

    def metas(self, module: str) -> list[Any]:
        """Metadata of a module's items, in their order; looked up once a sample, for all that is taken."""
        out = []
        for line, number in enumerate(self.which.tolist()):
            found = self._metas.get((module, number))
            if found is None:
                own = self.sample(line).segments
                found = [s.part.meta for s in own if s.part is not None and s.kind == module]
                self._metas[module, number] = found
            out += found
        return out

    def sample(self, line: int) -> Sample:
        """The sample of a line; made once, where samples are views."""
        if line not in self._seen:
            self.see([line])
        return self._seen[line]

    def see(self, lines: Iterable[int]) -> None:
        """Make the samples of these lines together, which sample() is asked for next."""
        new = [line for line in dict.fromkeys(lines) if line not in self._seen]
        if new:
            self._seen.update(zip(new, views_of(self.samples, self.which[new].tolist()), strict=True))

    def part(self, module: str, line: int, nth: int) -> Part:
        """The part of item number `nth` of a line's items of a module."""
        if (line, module) not in self._items:
            self._items[line, module] = self.sample(line).items(module)
        return self._items[line, module][nth]


@dataclass(frozen=True, eq=False)
class DataTable:
    """The samples of an index, of which take() works out those that a step needs.

    samples: in columns where they are many (Fitted); else the table of all of them is there.
    """

    samples: Sequence[Sample]
    inputs: PlanInputs
    _whole: SampleTable | None

    @staticmethod
    def of(index: Index, inputs: PlanInputs) -> DataTable:
        """The samples of an index that select() has gone through."""
        if isinstance(index.samples, Fitted):
            return DataTable(index.samples.of(inputs), inputs, None)
        return DataTable(index.samples, inputs, SampleTable.of(index.samples, inputs, index.skipped))

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, which: Column) -> SampleTable:
        """The samples with these ids, in this order. O(segments of theirs)."""
        if self._whole is not None:
            return self._whole.take(which)
        assert isinstance(self.samples, Fitted)
        return _table_of(self.samples, which, self.inputs)


def _table_of(samples: Fitted, which: Column, inputs: PlanInputs) -> SampleTable:
    lines = samples.lines(which)
    for number in which[lines.wrong | lines.strange].tolist():
        sample_length(samples.view(number), inputs)  # raises
    offset = lines.offset
    items = {}
    for k, module in enumerate(samples.modules):
        own = lines.module == k
        items[module] = Items(
            of=np.bincount(lines.sample[own], minlength=len(which)).astype(np.int64),
            rows=lines.size[own],
            offset=offset[own],
            cost=lines.cost[own],
            content=np.unique(lines.content[own], return_inverse=True)[1].astype(np.int64),
        )
    return SampleTable(
        samples=samples,
        which=which,
        ids=which,
        length=lines.length,
        supervised=lines.supervised,
        mtp=lines.ahead(inputs.mtp_depths),
        items=items,
        sources=samples.base.sources,
        source=lines.source,
    )


def _append_items(sample: Sample, inputs: PlanInputs, found: Mapping[str, list[_Found]]) -> None:
    """Append each item of a sample to its module's list."""
    at = int(sample.markers)  # after the begin marker
    for seg in sample.segments:
        if seg.part is None:
            at += seg.tokens
            continue
        rows, use = inputs.rows(seg.kind, seg.part), inputs.encoders[seg.kind]
        cost = use.cost(seg.part.meta)
        content = _content(seg.part, len(found[seg.kind]))
        found[seg.kind].append(_Found(rows, at, cost, content))
        at += rows


def _content(part: Part, nth: int) -> int:
    """63 bits that are equal where payloads and their sizes are. A part of unknown payload, which is made up,
    is equal to itself alone: nth is its number."""
    what = f"{part.sha256 or nth} {sorted(part.meta.items())}"
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little") >> 1


def _items(of: Sequence[int], found: Sequence[_Found]) -> Items:
    rows, offset, cost, content = zip(*found, strict=True) if found else ((), (), (), ())
    return Items(
        of=np.asarray(of, dtype=np.int64),
        rows=np.asarray(rows, dtype=np.int64),
        offset=np.asarray(offset, dtype=np.int64),
        cost=np.asarray(cost, dtype=np.float64),
        content=np.unique(np.asarray(content, dtype=np.int64), return_inverse=True)[1].astype(np.int64),
    )


def fingerprint(*columns: Column) -> int:
    """63 bits of columns."""
    found = hashlib.blake2b(digest_size=8)
    for column in columns:
        found.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return int.from_bytes(found.digest(), "little") >> 1
