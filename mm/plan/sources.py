"""The sources of a run and their blend, from the config and the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mm.config.schema import Config
from mm.config.sources import SourceConfig
from mm.data.sample import Index
from mm.errors import DataError, Refused
from mm.order.chosen import Chosen, Range
from mm.order.skips import Skips
from mm.order.stream import Source, Stream
from mm.plan.phases import in_phases


def stream_of(cfg: Config, index: Index) -> Stream:
    """The samples of a run in order.

    Sources with weights are blended. Without weights, and where the config has patterns alone, all samples
    are shuffled together. data.lengths makes phases of them (phases.py). Raises Refused and DataError where
    the sources do not serve.
    """
    sources, weights = _sources(cfg, index)
    if index.short:
        sources, weights = in_phases(sources, weights, cfg.data.lengths, index.short)
    try:
        return Stream.of(cfg.run.seed, sources, weights)
    except ValueError as error:
        raise Refused(f"data.train: {error}") from error


def _sources(cfg: Config, index: Index) -> tuple[list[Source], dict[int, Sequence[float]]]:
    """The sources, and by first position their weights."""
    weights: dict[int, Sequence[float]] = {0: [1.0]}
    if not index.selections:
        return [Source("", Chosen.of([Range(0, len(index.samples))]))], weights
    ranges = [Range(s.first, s.size, s.bits) for s in index.selections]
    names, entries = [s.name for s in index.selections], _given(cfg.data.train)
    if entries[0].weight is None:
        return [Source(_joint(names), _some(_joint(names), ranges), entries[0].epochs)], weights
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"data.train has two sources that are named {name}; needed: a name for each")
    sources = [
        Source(name, _some(name, [own]), e.epochs)
        for name, own, e in zip(names, ranges, entries, strict=True)
    ]
    weights[0] = [e.weight or 0.0 for e in entries]
    for change in cfg.data.weights:
        weights[change.sample] = _of_names(change.weights, names)
    return sources, weights


def check_length(cfg: Config, stream: Stream, skips: Skips) -> None:
    """Raise DataError where the sources end before a run that takes train.global_batch samples a step."""
    end, size, steps = stream.blend.end, cfg.train.global_batch, cfg.train.steps
    batches = skips.before(steps)
    if end is not None and end < batches * size:
        most = max(0, end // size - (batches - steps))
        left_out = f", and {batches - steps} of them are left out" if batches > steps else ""
        raise DataError(
            f"data.train has {end} samples in the epochs of its sources, enough for {end // size} batches of "
            f"{size}; train.steps is {steps}{left_out}; needed: more epochs, or train.steps={most}"
        )


def _given(entries: Sequence[str | SourceConfig]) -> list[SourceConfig]:
    return [SourceConfig(shards=e) if isinstance(e, str) else e for e in entries]


def _joint(names: Sequence[str]) -> str:
    """One source has its name; several that are shuffled together are the data set, as patterns are."""
    return names[0] if len(names) == 1 else ""


def _some(name: str, ranges: Sequence[Range]) -> Chosen:
    found = Chosen.of(ranges)
    if not len(found):
        raise DataError(
            f"source {name or 'of data.train'} has no sample; needed: another split or other shards"
        )
    return found


def _of_names(weights: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [weights.get(name, 0.0) for name in names]
