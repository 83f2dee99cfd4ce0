"""The samples of an index as a model takes them: items in pieces, long samples in portions, all by columns.

Encoders answer once for each distinct metadata of an item, in Python. Whatever is asked of samples then, one
after another or a million at once, is worked out from columns, without a loop over samples. The samples
themselves are views, made as the definitions in mm/plan/inputs.py, item_pieces.py and truncate.py say.
A number is that of a sample, or of one of its portions (portions.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from mm.data.columns.samples import Samples, Segments
from mm.data.columns.table import Array, Numbers
from mm.data.sample import Part, Sample, Segment, ShardSums, Tally, Views
from mm.plan.inputs import PlanInputs
from mm.plan.item_pieces import Encode, in_pieces, item_pieces
from mm.plan.portions import Found, Lengths, Portions
from mm.plan.truncate import Span, portion, truncated_to
from parallel.sequence.intervals import before, repeat_groups

TEXT = -1  # the module of text
UNKNOWN = -2  # of an item of a module that the model lacks
CHUNK = 1 << 16  # samples that are looked at together where all are
SCATTER = 0x9E3779B97F4A7C1  # an odd number that mixes bits


@dataclass(frozen=True, eq=False)
class Lines:
    """Texts and items of some samples, a line each, in order of sample.

    sample: which of them. module: the number of an encoder, TEXT or UNKNOWN. size: tokens, or rows of an
    item. learned: text with a loss. cost, content: of items (Items). piece: of items a number, equal where
    module and metadata are, else -1. By sample: markers; truncated: more follows that is not in it; nth: of
    a portion its number, from 0 on, -1 of others; wrong: an encoder cannot take an item; strange: the model
    lacks a module that it names; source: its code.
    """

    sample: Numbers
    module: Numbers
    size: Numbers
    learned: Array
    cost: Array
    content: Numbers
    piece: Numbers
    markers: Array
    truncated: Array
    nth: Numbers
    wrong: Array
    strange: Array
    source: Numbers

    def sums(self, of: Array) -> Numbers:
        """The sum of a column by sample."""
        return np.bincount(self.sample, of, len(self.markers)).astype(np.int64)

    @property
    def length(self) -> Numbers:
        """By sample, in tokens."""
        return 2 * self.markers + self.sums(self.size)

    @property
    def ends(self) -> Numbers:
        """By sample, whether it has an end marker that is learned: 0 or 1."""
        return (self.markers & ~self.truncated).astype(np.int64)

    @property
    def supervised(self) -> Numbers:
        """By sample, tokens that carry loss."""
        return self.ends + self.sums((self.size - self._first) * self.learned)

    @property
    def _first(self) -> Numbers:
        """By line, 1 where the first token of its sample is: nothing comes before it, so it has no loss."""
        found: Numbers = ((self.offset == 0) & (self.size > 0)).astype(np.int64)
        return found

    @property
    def offset(self) -> Numbers:
        """By line, its first token in its sample."""
        each = before(self.size)
        first = np.searchsorted(self.sample, np.arange(len(self.markers)))
        of_sample = np.append(each, self.size.sum())[first]
        found: Numbers = each - of_sample[self.sample] + self.markers[self.sample]
        return found

    def ahead(self, depths: int) -> Numbers:
        """By depth of multi-token prediction and sample, tokens that carry loss: those that far behind the
        begin, [depths, samples]. The label of a token stands one position before it."""
        offset, total = self.offset, self.supervised
        begin, end = np.maximum(offset - 1, 0), offset - 1 + self.size
        last = self.markers - 1 + self.sums(self.size)
        rows = []
        for stop in range(1, depths + 1):
            early = np.clip(np.minimum(end, stop) - begin, 0, None) * self.learned
            rows.append(total - self.sums(early) - self.ends * (last < stop))
        return np.asarray(rows, dtype=np.int64).reshape(depths, len(self.markers))


class _Sizes:
    """What encoders make of items, by pair of module and metadata: their pieces, end to end.

    pair: those that are known, ascending. first: the first piece of each, and the end. wrong: whether its
    encoder cannot take it. module, size, cost, content: by piece.
    """

    def __init__(self, base: Samples, inputs: PlanInputs, encode: Encode | None) -> None:
        self.inputs, self._base, self._encode = inputs, base, encode
        self.modules = list(inputs.encoders)
        self._metas = sum(len(p.table.strings["metas"]) for p in base.pairs)
        known = {m: k for k, m in enumerate(self.modules)}
        names = [known.get(name, UNKNOWN) for name in base.names.texts]
        self.module_of = np.asarray([*names, TEXT], dtype=np.int64)  # by code of a name; the last is of text
        self.pair = np.empty(0, dtype=np.int64)
        self.first = np.zeros(1, dtype=np.int64)
        self.wrong = np.empty(0, dtype=bool)
        self._pieces: dict[int, tuple[bool, list[tuple[int, int, float, int]]]] = {}
        self._stack()

    def find(self, module: Numbers, meta: Numbers) -> Numbers:
        """By item, its place among pairs; those that are new are asked for."""
        pair = module * self._metas + meta
        new = np.setdiff1d(pair, self.pair)
        if len(new):
            for one in new.tolist():
                self._pieces[one] = self._ask(*divmod(one, self._metas))
            self._stack()
        found: Numbers = np.searchsorted(self.pair, pair)
        return found

    def _ask(self, module: int, meta: int) -> tuple[bool, list[tuple[int, int, float, int]]]:
        name = self.modules[module]
        part = Part("", "", 0, 0, "", self._base.meta(meta))
        seg = Segment(name, 0, part, True, None)
        segments = (
            [seg] if self._encode is None else item_pieces(seg, part, self.inputs.encoders, self._encode)
        )
        try:
            return False, [self._piece(module, s) for s in segments]
        except ValueError:
            return True, [(module, 0, 0.0, 0)]

    def _piece(self, module: int, seg: Segment) -> tuple[int, int, float, int]:
        if seg.part is None:
            return TEXT, seg.tokens, 0.0, 0
        rows, cost = self.inputs.rows(seg.kind, seg.part), self.inputs.encoders[seg.kind].cost(seg.part.meta)
        digest = hashlib.blake2b(f"{sorted(seg.part.meta.items())}".encode(), digest_size=8).digest()
        return module, rows, cost, int.from_bytes(digest, "little") >> 1

    def _stack(self) -> None:
        pairs = sorted(self._pieces)
        found = [self._pieces[p] for p in pairs]
        pieces = [piece for _, own in found for piece in own]
        self.pair = np.asarray(pairs, dtype=np.int64)
        self.wrong = np.asarray([wrong for wrong, _ in found], dtype=bool)
        self.first = np.cumsum([0, *(len(own) for _, own in found)]).astype(np.int64)
        module, size, cost, content = zip(*pieces, strict=True) if pieces else ((), (), (), ())
        self.module, self.size = np.asarray(module, dtype=np.int64), np.asarray(size, dtype=np.int64)
        self.cost, self.content = np.asarray(cost, dtype=np.float64), np.asarray(content, dtype=np.int64)


class Fitted(Views):
    """The samples of an index as a model takes them.

    encode: of texts between pieces of items; None: items are not taken apart.
    """

    def __init__(
        self,
        base: Samples,
        inputs: PlanInputs,
        encode: Encode | None = None,
        portions: Portions | None = None,
        sizes: _Sizes | None = None,
    ) -> None:
        self.base, self.inputs, self.encode = base, inputs, encode
        self.portions = portions or Portions.none()
        self._sizes = sizes or _Sizes(base, inputs, encode)
        self._whole: dict[
            tuple[str, int], bool
        ] = {}  # by module and metadata, whether an item stays as it is

    def of(self, inputs: PlanInputs) -> Fitted:
        """The same as another model takes them, or with another context."""
        same = inputs.encoders is self.inputs.encoders and inputs.limits == self.inputs.limits
        return Fitted(self.base, inputs, self.encode, self.portions, self._sizes if same else None)

    def chunks(self, which: Numbers | None = None) -> Iterator[Numbers]:
        """The samples with these numbers, None: all, in parts of up to CHUNK; one part at least."""
        n = len(self) if which is None else len(which)
        for start in range(0, max(n, 1), CHUNK):
            stop = min(start + CHUNK, n)
            yield np.arange(start, stop) if which is None else which[start:stop]

    def with_portions(self, portions: Portions) -> Fitted:
        """The same with these portions."""
        return Fitted(self.base, self.inputs, self.encode, portions, self._sizes)

    def __len__(self) -> int:
        return len(self.base) + self.portions.more

    def shard_of(self, which: Numbers) -> Numbers:
        """By sample number, the number of its shard."""
        return self.base.shard_of(self.portions.find(which).sample)

    @property
    def shard_sums(self) -> tuple[ShardSums, ...]:
        """By shard, digests of its samples as they are."""
        return self.base.shard_sums

    def fingerprints(self, first: int, stop: int) -> Iterator[bytes]:
        """As of the samples themselves, and of those that are split their portions."""
        begin, end = self.portions.find(np.asarray([first, stop])).sample.tolist()
        yield from self.base.fingerprints(begin, end)
        yield self.portions.fingerprint(begin, end)

    def views(self, numbers: Sequence[int]) -> list[Sample]:
        found = self.portions.find(np.asarray(numbers, dtype=np.int64))
        samples = self.base.views(found.sample.tolist())
        return [self._view(*one) for one in zip(numbers, samples, found.portion.tolist(), strict=True)]

    def _view(self, number: int, sample: Sample, at: int) -> Sample:
        """A sample of the index as it is here. at: which portion, -1 for all of it."""
        if self.encode is not None and not all(map(self._stays, sample.segments)):
            sample = in_pieces(sample, self.inputs.encoders, self.encode)
        if at >= 0:
            span = Span(int(self.portions.start[at]), int(self.portions.stop[at]))
            if not self.portions.split:
                return truncated_to(sample, span, self.inputs)
            sample = portion(sample, span, self.portions.place(at), self.inputs)
        return sample if sample.id == number else replace(sample, id=number)

    def _stays(self, seg: Segment) -> bool:
        """Whether a segment is text, or an item that its encoder does not take apart."""
        if seg.part is None or seg.kind not in self.inputs.encoders:
            return True
        key = seg.kind, id(seg.part.meta)  # those of `base`, which it keeps
        if key not in self._whole:
            assert self.encode is not None
            found = item_pieces(seg, seg.part, self.inputs.encoders, self.encode)
            self._whole[key] = len(found) == 1 and found[0] is seg
        return self._whole[key]

    @property
    def modules(self) -> list[str]:
        """The encoders, in order of their numbers."""
        return self._sizes.modules

    def tally(self, which: Numbers) -> Tally:
        """Counts of samples with these numbers."""
        parts = []
        for some in self.chunks(which):
            lines = self.lines(some)
            parts.append(tallied(self, some, lines, np.ones(len(some), dtype=bool)))
        return reduce(added, parts)

    def lines(self, which: Numbers) -> Lines:
        """Texts and items of samples with these numbers, in this order. O(lines), of split samples those of
        the whole, once for all of their portions."""
        found = self.portions.find(which)
        if (found.portion < 0).all():
            return self._lines(found.sample)[0]
        return self._inside(found)

    def lengths(self, which: Numbers) -> Lengths:
        """Texts and items, whole, of samples as the index has them."""
        lines, of, seg = self._lines(which)
        size = np.bincount(of, lines.size, len(seg.meta)).astype(np.int64)
        sample = np.repeat(np.arange(len(which)), seg.of)
        return Lengths(sample, size, seg.meta >= 0, seg.loss & (seg.meta < 0), seg.markers)

    def _lines(self, which: Numbers) -> tuple[Lines, Numbers, Segments]:
        """Of whole samples; by line, its segment, and those."""
        sizes, seg = self._sizes, self.base.segments(which)
        module, sample = sizes.module_of[seg.kind], np.repeat(np.arange(len(which)), seg.of)
        item = np.flatnonzero(module >= 0)
        pair = sizes.find(module[item], seg.meta[item])
        count, first = np.ones(len(module), dtype=np.int64), np.full(len(module), -1, dtype=np.int64)
        count[item], first[item] = np.diff(sizes.first)[pair], sizes.first[pair]
        # A line a piece: `of` is its segment.
        of = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(of)) - before(count)[of]
        piece = np.where(first[of] < 0, -1, first[of] + nth)
        taken = piece >= 0
        at = piece[taken]
        line = {
            "module": _filled(module[of], taken, sizes.module[at]),
            "size": _filled(seg.tokens[of], taken, sizes.size[at]),
            "cost": _filled(np.zeros(len(of)), taken, sizes.cost[at]),
            "content": _filled(
                np.zeros_like(of), taken, sizes.content[at] + seg.content[of][taken] * SCATTER
            ),
            "learned": seg.loss[of] & (module[of] == TEXT),
            "piece": piece,
        }
        wrong = np.zeros(len(which), dtype=bool)
        wrong[sample[item[sizes.wrong[pair] | self._large(seg.bytes[item])]]] = True
        strange = np.zeros(len(which), dtype=bool)
        strange[sample[(module == UNKNOWN) | (sizes.module_of[seg.depends] == UNKNOWN)]] = True
        lines = Lines(
            sample=sample[of],
            **line,
            markers=seg.markers,
            truncated=np.zeros(len(which), dtype=bool),
            nth=np.full(len(which), -1, dtype=np.int64),
            wrong=wrong,
            strange=strange,
            source=seg.source,
        )
        return lines, of, seg

    def _large(self, size: Numbers) -> Array:
        limits = self.inputs.limits
        return np.zeros(len(size), dtype=bool) if limits is None else size > limits.bytes

    def _inside(self, found: Found) -> Lines:
        """The lines of samples and portions, as portion() has them."""
        own, at = self.portions, found.portion
        sample, of_sample = np.unique(found.sample, return_inverse=True)
        lines, of, seg = self._lines(sample)
        size = np.bincount(of, lines.size, len(seg.meta)).astype(np.int64)
        begin, whole = before(size), lines.sums(lines.size)
        # By segment its tokens, and by portion those that it has, all samples end to end.
        end, base = begin + size, before(whole)[of_sample]
        part = np.flatnonzero(at >= 0)
        start, stop, nth = base.copy(), base + whole[of_sample], np.full_like(at, -1)
        start[part], stop[part] = (base[part] + x[at[part]] for x in (own.start, own.stop))
        truncated = stop < base + whole[of_sample]
        if own.split:
            nth[part] = own.nth(at[part])
        # A segment without a token belongs to the portion that ends where it stands.
        first = before(seg.of)[of_sample]
        last = first + seg.of[of_sample]
        here = np.searchsorted(end, stop, side="right")
        here += begin[np.minimum(here, len(begin) - 1)] < stop
        last = np.where(at < 0, last, np.minimum(here, last))
        first = np.where(start == base, first, np.searchsorted(end, start, side="right"))
        one, segment = repeat_groups(first, last - first)
        count = np.bincount(of, minlength=len(size))
        nth_segment, line = repeat_groups(before(count)[segment], count[segment])
        one, segment = one[nth_segment], segment[nth_segment]
        inside = np.minimum(end[segment], stop[one]) - np.maximum(begin[segment], start[one])
        return Lines(
            sample=one,
            size=np.where(seg.meta[segment] < 0, inside, lines.size[line]),
            **{
                name: getattr(lines, name)[line] for name in ("module", "learned", "cost", "content", "piece")
            },
            truncated=truncated,
            nth=nth,
            **{name: getattr(lines, name)[of_sample] for name in ("markers", "wrong", "strange", "source")},
        )


def _filled(column: Array, where: Array, values: Array) -> Array:
    out = column.copy()
    out[where] = values
    return out


def tallied(fitted: Fitted, which: Numbers, lines: Lines, chosen: Array) -> Tally:
    """Count those samples of `which` that are chosen: bool [which]. lines: of all of them."""
    shard, n = fitted.shard_of(which), len(fitted.base.shards)

    def count(samples: Array) -> Numbers:
        return np.bincount(shard[chosen & samples], minlength=n)

    items = {}
    for module in sorted(fitted.modules):
        own = chosen[lines.sample] & (lines.module == fitted.modules.index(module))
        if own.any():
            items[module] = np.bincount(shard[lines.sample[own]], minlength=n)
    part = lines.nth >= 0
    return Tally(count(chosen), count(lines.truncated & ~part), count(lines.nth == 0), count(part), items)


def added(a: Tally, b: Tally) -> Tally:
    """Both counts together."""
    zero = np.zeros_like(a.samples)
    items = {m: a.items.get(m, zero) + b.items.get(m, zero) for m in sorted({*a.items, *b.items})}
    return Tally(
        a.samples + b.samples, a.truncated + b.truncated, a.split + b.split, a.portions + b.portions, items
    )
