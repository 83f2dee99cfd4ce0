"""An entry of data.train or data.eval: a pattern of shards, or a mapping with what to take of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from mm.config.build import Section, unknown_key
from mm.data.remote.urls import is_remote
from mm.data.sources import Wanted
from mm.errors import Refused


class SourceConfig(Section):
    """A source of samples. E.g. {shards: "coco/*.tar", name: coco, weight: 0.3}."""

    shards: str | list[str] = Field(description="patterns of its shards, from the config's folder")
    name: str | None = Field(
        None, min_length=1, description="its name in metrics and weights; by default told from its shards"
    )
    layout: str | dict[str, Any] | None = Field(
        None, description="how its samples are written; by default this is found out"
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="its share of the samples, in proportion to the other weights; all sources have one, or "
        "none: then they are shuffled together",
    )
    epochs: int | None = Field(
        None, ge=1, description="how often each of its samples may come; by default without end"
    )
    limit: int | None = Field(None, ge=1, description="only so many of its samples, the first ones")
    split: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        description="only samples whose key has its hash in this part of [0, 1), such as [0, 0.99] and "
        "[0.99, 1]; a sample stays in its part when shards are added",
    )

    @property
    def patterns(self) -> list[str]:
        """The patterns of its shards."""
        return [self.shards] if isinstance(self.shards, str) else self.shards

    @property
    def wanted(self) -> Wanted:
        """The source as an index takes it."""
        return Wanted(tuple(self.patterns), self.name, self.layout, self.limit, self.split)


def _kind(value: object) -> str:
    return "a pattern" if isinstance(value, str) else "a mapping"


Entry = Annotated[
    Annotated[str, Tag("a pattern")] | Annotated[SourceConfig, Tag("a mapping")], Discriminator(_kind)
]


class WeightsConfig(Section):
    """Weights from a sample on."""

    sample: int = Field(ge=1, description="the first sample of the run that they hold for, counted from 0")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="by name of source, its weight; a source that is not named has none"
    )


class LengthsConfig(Section):
    """A bound on lengths up to a sample."""

    until: int = Field(
        ge=1, description="the first sample of the run that it no longer holds for, counted from 0"
    )
    longest: int = Field(ge=1, description="length of the longest sample that is drawn, in tokens")


def patterns_of(entries: Sequence[str | SourceConfig]) -> list[str]:
    """The patterns of all entries."""
    return [p for e in entries for p in ([e] if isinstance(e, str) else e.patterns)]


def moved(entries: Sequence[str | SourceConfig], move: Callable[[str], str]) -> list[str | dict[str, Any]]:
    """Entries as plain data, with another path for each pattern that is no URL."""

    def path(pattern: str) -> str:
        return pattern if is_remote(pattern) else move(pattern)

    return [
        path(e) if isinstance(e, str) else {**e.model_dump(mode="json"), "shards": [*map(path, e.patterns)]}
        for e in entries
    ]


def check_sources(entries: Sequence[str | SourceConfig], changes: Sequence[WeightsConfig]) -> None:
    """Refuse entries of data.train that contradict each other. changes: data.weights."""
    given = [e for e in entries if isinstance(e, SourceConfig)]
    for e in given:
        if e.split is not None and not e.split[0] < e.split[1]:
            raise Refused(f"split is {list(e.split)} of {e.shards}; needed: [a, b] with a < b")
    names = [e.name for e in given if e.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"data.train has two sources named {name}; needed: a name for each")
    weighted = [e for e in given if e.weight is not None]
    if weighted and len(weighted) < len(entries):
        without = next(e for e in entries if isinstance(e, str) or e.weight is None)
        what = without if isinstance(without, str) else without.name or without.shards
        raise Refused(
            f"data.train: {what} has no weight, others have; needed: a weight for each source, or for none"
        )
    if not weighted and len({e.epochs for e in given} | {None for e in entries if isinstance(e, str)}) > 1:
        raise Refused(
            "data.train: sources without weights are shuffled together, so their epochs must be equal; "
            "needed: a weight for each, or the same epochs"
        )
    _check_changes(entries, changes, weighted=bool(weighted))


def check_lengths(lengths: Sequence[LengthsConfig], context: int) -> None:
    """Refuse entries of data.lengths that contradict each other, or bound nothing. context: data.context."""
    for what, found in (("until", [e.until for e in lengths]), ("longest", [e.longest for e in lengths])):
        if any(b <= a for a, b in pairwise(found)):
            raise Refused(f"data.lengths have {what} {found}; needed: rising numbers, short samples first")
    if lengths and lengths[-1].longest >= context:
        raise Refused(
            f"data.lengths: longest is {lengths[-1].longest}, but no sample is longer than data.context, "
            f"{context}; needed: less than that"
        )


def _check_changes(
    entries: Sequence[str | SourceConfig], changes: Sequence[WeightsConfig], *, weighted: bool
) -> None:
    if changes and not weighted:
        raise Refused("data.weights, but no source has a weight; needed: one for each, for the beginning")
    starts = [c.sample for c in changes]
    if any(b <= a for a, b in zip([0, *starts], starts, strict=False)):
        raise Refused(f"data.weights begin at samples {starts}; needed: rising numbers above 0")
    names = [e.name for e in entries if isinstance(e, SourceConfig) and e.name is not None]
    for change in changes:
        for name in change.weights:
            if name not in names:
                raise Refused(unknown_key(f"data.weights: {name}", name, names))
