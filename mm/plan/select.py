"""Select the samples of a data set that train: those that are whole and fit the model.

A pure function of (index, config): every rank leaves out the same samples, and no message is needed. A sample
that is left out keeps its id and counts as known to be bad, so that no other sample moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice

import numpy as np

from mm.config.data import DataConfig
from mm.data.columns.samples import Samples
from mm.data.sample import Index, Sample, Skipped
from mm.data.storage import LOCAL, Storage
from mm.errors import DataError
from mm.plan.fitted import Fitted, added, tallied
from mm.plan.inputs import PlanInputs, sample_length
from mm.plan.measured import SHORTENED, Measured, measured
from mm.plan.portions import Portions, beginnings
from mm.plan.portions import split as portions_of
from mm.plan.truncate import largest_item, split_sample, truncated_sample
from parallel.sequence.intervals import Column, before, column

SHOWN = 3  # reasons that are listed


def select(index: Index, inputs: PlanInputs, rules: DataConfig, storage: Storage = LOCAL) -> Index:
    """The index with the samples that do not fit left out, truncated or split, by data.misfit and
    data.overlong. Portions of a sample that is split have numbers of their own, in its place.

    Raises DataError with all counts where these keys refuse such samples, where more than data.max_skipped of
    the samples are lost or left out. A sample that names a module which the model lacks does not fit either.
    """
    index, found = _measured(index, inputs, rules.overlong, storage)
    _refuse(index, found, inputs, rules)
    if rules.overlong in SHORTENED:
        index, found = _shortened(index, found, inputs, split=rules.overlong == "split")
    skipped, tally = LeftOut.of(index, found, inputs), found.tally
    # Where only some samples are taken, they are counted when somebody asks.
    chosen = replace(index, skipped=skipped, tally=None if index.selections else tally)
    _check_share(chosen, rules.max_skipped)
    return chosen


def _measured(index: Index, inputs: PlanInputs, overlong: str, storage: Storage) -> tuple[Index, Measured]:
    """The index with its samples as the model takes them, and those that do not fit."""
    samples = index.samples
    if isinstance(samples, Samples | Fitted):
        fitted = samples.of(inputs) if isinstance(samples, Fitted) else Fitted(samples, inputs)
        found = measured(fitted, overlong, lambda: _measure(fitted, overlong), storage)
        return replace(index, samples=fitted), found
    misfit, long, length = [], [], []
    for sample in samples:
        try:
            _check_modules(sample, inputs)
            n = sample_length(sample, inputs)
        except DataError:
            misfit.append(sample.id)
            continue
        if n > inputs.context:
            long.append(sample.id)
            length.append(n)
    return index, Measured(column(misfit), column(long), column(length), Portions.none())


def _measure(fitted: Fitted, overlong: str) -> Measured:
    """Look at all samples."""
    parts = [_of_chunk(fitted, which) for which in fitted.chunks()]
    misfit, long, length = (np.concatenate([getattr(p, f) for p in parts]) for f in Measured._fields[:3])
    portions, tally = Portions.none(), reduce(added, [p.tally for p in parts if p.tally is not None])
    if overlong in SHORTENED:
        make = portions_of if overlong == "split" else beginnings
        every = [make(w, fitted.lengths(w), fitted.inputs.context) for w in fitted.chunks(long)]
        portions = Portions.joined(every)
        tally = added(tally, fitted.with_portions(portions).tally(portions.every))
    return Measured(misfit, long, length, portions, tally)


def _of_chunk(fitted: Fitted, which: Column) -> Measured:
    lines = fitted.lines(which)
    length, wrong = lines.length, lines.wrong | lines.strange
    long = ~wrong & (length > fitted.inputs.context)
    tally = tallied(fitted, which, lines, ~wrong & ~long)
    return Measured(which[wrong], which[long], length[long], Portions.none(), tally)


def _shortened(index: Index, found: Measured, inputs: PlanInputs, *, split: bool) -> tuple[Index, Measured]:
    """The index with long samples truncated or split, and their portions."""
    samples, portions = index.samples, found.portions
    if isinstance(samples, Fitted):
        made: Sequence[Sample] = samples.with_portions(portions)
    else:
        short = {i: _short(samples[i], inputs, split) for i in found.overlong.tolist()}
        short = {i: own for i, own in short.items() if own}
        every = [one for s in samples for one in short.get(s.id, [s])]
        made = tuple(s if s.id == k else replace(s, id=k) for k, s in enumerate(every))
        counts = column([len(own) for own in short.values()])
        nowhere = np.zeros(int(counts.sum()), dtype=np.int64)
        first = column([*before(counts), counts.sum()])
        portions = Portions(column([*short]), first, nowhere, nowhere, split)
    firsts, selections = portions.renumbered(index)
    index = replace(index, samples=made, firsts=firsts, selections=selections)
    return index, found._replace(portions=portions)


def _short(sample: Sample, inputs: PlanInputs, split: bool) -> list[Sample]:
    if split:
        return split_sample(sample, inputs)
    short = truncated_sample(sample, inputs)
    return [] if short is None else [short]


class LeftOut(Mapping[int, Skipped]):
    """Why samples are left out, in columns: the words are made when they are asked for."""

    def __init__(
        self, samples: Sequence[Sample], ids: Column, length: Column, inputs: PlanInputs, split: bool
    ) -> None:
        self._samples, self._inputs, self._split = samples, inputs, split
        self.ids, self._length = ids, length
        """Ascending; by sample its length, 0 for one with an item that does not fit."""

    @staticmethod
    def of(index: Index, found: Measured, inputs: PlanInputs) -> LeftOut:
        """Those that do not fit, and those that are too long and have no portions."""
        portions = found.portions
        left = ~np.isin(found.overlong, portions.sample)
        misfit, overlong = (portions.number(i) for i in (found.misfit, found.overlong[left]))
        length = found.length[left]
        ids = np.concatenate([misfit, overlong])
        order = np.argsort(ids, kind="stable")
        lengths = np.concatenate([np.zeros_like(misfit), length])
        return LeftOut(index.samples, ids[order], lengths[order], inputs, portions.split)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.tolist())

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int | np.integer) and self._place(int(number)) is not None

    def __getitem__(self, number: int) -> Skipped:
        at = self._place(number)
        if at is None:
            raise KeyError(number)
        sample, n = self._samples[number], int(self._length[at])
        if n == 0:
            return Skipped("misfit", _misfit(sample, self._inputs))
        where, context = f"sample {sample.key} of {sample.shard}", self._inputs.context
        if self._split:
            largest, room = largest_item(sample, self._inputs), context - 2 * sample.markers
            return Skipped(
                "overlong", f"{where} has an item of {largest} tokens, a portion has room for {room}"
            )
        return Skipped("overlong", f"{where} is {n} tokens long, data.context is {context}")

    def _place(self, number: int) -> int | None:
        at = int(np.searchsorted(self.ids, number))
        return at if at < len(self.ids) and self.ids[at] == number else None


def _misfit(sample: Sample, inputs: PlanInputs) -> str:
    """Why an item of a sample does not fit."""
    try:
        _check_modules(sample, inputs)
        sample_length(sample, inputs)
    except DataError as error:
        return str(error)
    raise AssertionError(f"sample {sample.key} of {sample.shard} fits")


def lost_samples(index: Index) -> int:
    """How many samples could not be indexed, as far as is known: one a key, and one a loss without a key.

    Nobody knows how much a torn shard lacks: it counts as one more whole shard, of average size.
    """
    return len(_lost(index)) + len(index.torn) * -(-len(index.samples) // max(1, len(index.shards)))


def _lost(index: Index) -> set[tuple[str, str]]:
    return {(shard, key or why) for shard, key, why in index.broken}


def _check_modules(sample: Sample, inputs: PlanInputs) -> None:
    for seg in sample.segments:
        named, what = (seg.depends, "text that depends on") if seg.part is None else (seg.kind, "an item for")
        if named is not None and named not in inputs.encoders:
            have = ", ".join(inputs.encoders) or "none"
            raise DataError(
                f"sample {sample.key} of {sample.shard} has {what} module {named!r}, which the model lacks "
                f"(it has: {have})"
            )


def _refuse(index: Index, found: Measured, inputs: PlanInputs, rules: DataConfig) -> None:
    """Raise DataError with all samples that the config refuses, and the keys that would leave them out."""
    refusals, total = [], len(index.samples)
    misfit, overlong = len(found.misfit), len(found.overlong)
    if misfit and rules.misfit == "refuse":
        hint = _skip_hint(index, rules, "misfit", misfit)
        example = _misfit(index.samples[int(found.misfit[0])], inputs)
        refusals.append(f"{example} ({misfit} of {total} samples have an item that does not fit{hint})")
    if overlong and rules.overlong == "refuse":
        most, at = int(found.length.max()), int(found.length.argmax())
        first, longest = (index.samples[int(i)] for i in (found.overlong[0], found.overlong[at]))
        hint = _skip_hint(index, rules, "overlong", overlong)
        also = "" if at == 0 else f", the first sample {first.key} with {found.length[0]}"
        refusals.append(
            f"{overlong} of {total} samples are longer than data.context: the longest is sample "
            f"{longest.key} of {longest.shard} with {most} tokens{also}; raise data.context to {most}, or "
            f"split them: data.overlong=split; or keep their beginnings: data.overlong=truncate{hint}"
        )
    if refusals:
        raise DataError("; ".join(refusals))


def _skip_hint(index: Index, rules: DataConfig, key: str, n: int) -> str:
    """How to leave out these n samples; "" where none would be left."""
    if n == len(index.samples):
        return ""
    needed = _needed(index, n, rules.max_skipped)
    more = "" if needed is None else f" with data.max_skipped={needed:g}"
    return f"; or leave them out: data.{key}=skip{more}"


def _needed(index: Index, left_out: int, bound: float) -> float | None:
    """The data.max_skipped that losses and `left_out` need, in four digits; None where `bound` is enough."""
    lost = lost_samples(index)
    missing, total = lost + left_out, lost + len(index.samples)
    return None if missing / total <= bound else -(-missing * 10_000 // total) / 10_000


def _check_share(index: Index, bound: float) -> None:
    """Raise DataError where more samples are lost or left out than data.max_skipped allows."""
    lost, left_out = lost_samples(index), len(index.skipped)
    if len(index.samples) == left_out:
        raise DataError(f"all {left_out} samples are left out: {'; '.join(_reasons(index))}")
    needed = _needed(index, left_out, bound)
    if needed is not None:
        raise DataError(
            f"{lost + left_out} of {lost + len(index.samples)} samples are lost or left out, "
            f"data.max_skipped is {bound:g}: {'; '.join(_counts(index))}; for example "
            f"{'; '.join(_reasons(index))}. Mend the data, or allow it: data.max_skipped={needed:g}"
        )


def _counts(index: Index) -> list[str]:
    """How many samples are lost or left out, for each reason and shard; the most numerous first."""
    found = Counter((index.samples[i].shard, str(skip.kind)) for i, skip in index.skipped.items())
    found += Counter((shard, "unreadable") for shard, _ in _lost(index))
    found += Counter((shard, "torn") for shard in index.torn)
    return [f"{n} {kind} in {shard}" for (shard, kind), n in found.most_common(8)]


def _reasons(index: Index) -> list[str]:
    """The first reasons for which samples are lost or left out."""
    lost = [f"{key or 'a part'} of {shard}: {why}" for shard, key, why in index.broken[:SHOWN]]
    return (lost + [index.skipped[i].why for i in islice(index.skipped, SHOWN)])[:SHOWN]
