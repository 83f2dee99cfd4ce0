"""Select the samples of a data set that train: those that are whole and fit the model.

A pure function of (index, config): every rank leaves out the same samples, and no message is needed. A sample
that is left out keeps its id and counts as known to be bad, so that no other sample moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mm.config.data import DataConfig
from mm.data.sample import Index, Sample, Segment, Skipped, grouped
from mm.errors import DataError
from mm.plan.inputs import PlanInputs, sample_length, supervised_tokens


def select(index: Index, inputs: PlanInputs, rules: DataConfig) -> Index:
    """The index with the samples that do not fit left out or truncated, by data.misfit and data.overlong.

    Raises DataError with all counts where these keys refuse such samples, where more than data.max_skipped of
    the samples are lost or left out, and where a sample names a module that the model lacks.
    """
    misfit: dict[int, str] = {}
    overlong: dict[int, int] = {}
    for sample in index.samples:
        _check_modules(sample, inputs)
        try:
            n = sample_length(sample, inputs)
        except DataError as error:
            misfit[sample.id] = str(error)
            continue
        if n > inputs.context:
            overlong[sample.id] = n
    _refuse(index, misfit, overlong, rules)
    skipped = {i: Skipped("misfit", why) for i, why in misfit.items()}
    truncated: dict[int, Sample] = {}
    for i, n in overlong.items():
        short = _truncated(index.samples[i], inputs) if rules.overlong == "truncate" else None
        if short is None:
            where = f"sample {index.samples[i].key} of {index.samples[i].shard}"
            why = f"{where} is {n} tokens long, data.context is {inputs.context}"
            skipped[i] = Skipped("overlong", why)
        else:
            truncated[i] = short
    samples = tuple(truncated.get(s.id, s) for s in index.samples)
    chosen = replace(index, samples=samples, skipped=dict(sorted(skipped.items())))
    _check_share(chosen, rules.max_skipped)
    return chosen


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


def _refuse(index: Index, misfit: Mapping[int, str], overlong: Mapping[int, int], rules: DataConfig) -> None:
    """Raise DataError with all samples that the config refuses, and the keys that would leave them out."""
    refusals, total = [], len(index.samples)
    if misfit and rules.misfit == "refuse":
        hint = _skip_hint(index, rules, "misfit", len(misfit))
        example = next(iter(misfit.values()))
        refusals.append(f"{example} ({len(misfit)} of {total} samples have an item that does not fit{hint})")
    if overlong and rules.overlong == "refuse":
        first, longest = (index.samples[i] for i in (min(overlong), max(overlong, key=overlong.__getitem__)))
        most, hint = overlong[longest.id], _skip_hint(index, rules, "overlong", len(overlong))
        also = "" if first is longest else f", the first sample {first.key} with {overlong[first.id]}"
        refusals.append(
            f"{len(overlong)} of {total} samples are longer than data.context: the longest is sample "
            f"{longest.key} of {longest.shard} with {most} tokens{also}; raise data.context to {most}, or "
            f"keep their beginnings: data.overlong=truncate{hint}"
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


def _truncated(sample: Sample, inputs: PlanInputs) -> Sample | None:
    """The beginning of a sample that fits the context; None where nothing of it would be learned.

    Text is truncated to the token, an item is kept whole or dropped. All that follows is dropped too.
    """
    room, kept = inputs.context - 2 * sample.markers, list[Segment]()
    for group in grouped(sample.segments):
        n = sum(seg.tokens if seg.part is None else inputs.rows(seg.kind, seg.part) for seg in group)
        if n <= room:
            kept += group
        elif len(group) == 1 and group[0].part is None and room:
            kept.append(_first_tokens(group[0], room))
        room -= n
        if room < 0:
            break
    short = replace(sample, segments=tuple(kept), truncated=True)
    return short if supervised_tokens(short) else None


def _first_tokens(seg: Segment, n: int) -> Segment:
    return replace(seg, tokens=n, written=seg.tokens)


def _check_share(index: Index, bound: float) -> None:
    """Raise DataError where more samples are lost or left out than data.max_skipped allows."""
    lost, left_out = lost_samples(index), len(index.skipped)
    if len(index.samples) == left_out:
        raise DataError(f"all {left_out} samples are left out: {'; '.join(_reasons(index)[:3])}")
    needed = _needed(index, left_out, bound)
    if needed is not None:
        raise DataError(
            f"{lost + left_out} of {lost + len(index.samples)} samples are lost or left out, "
            f"data.max_skipped is {bound:g}: {'; '.join(_counts(index))}; for example "
            f"{'; '.join(_reasons(index)[:3])}. Mend the data, or allow it: data.max_skipped={needed:g}"
        )


def _counts(index: Index) -> list[str]:
    """How many samples are lost or left out, for each reason and shard; the most numerous first."""
    shard_of = [s.shard for s in index.samples]
    found = Counter((shard_of[i], str(skip.kind)) for i, skip in index.skipped.items())
    found += Counter((shard, "unreadable") for shard, _ in _lost(index))
    found += Counter((shard, "torn") for shard in index.torn)
    return [f"{n} {kind} in {shard}" for (shard, kind), n in found.most_common(8)]


def _reasons(index: Index) -> Sequence[str]:
    lost = [f"{key or 'a part'} of {shard}: {why}" for shard, key, why in index.broken]
    return lost + [skip.why for skip in index.skipped.values()]
