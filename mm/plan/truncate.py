"""A sample that is longer than the context: its beginning, or all of it in portions. Pure.

Text is parted between tokens. An item is never parted: it goes whole to the portion that it begins in, and
where that has no room for it, the next portion begins with it. Portions have markers of their own where the
sample has them, and the end marker is learned at the end of the sample alone. So the first portion is what a
truncated sample keeps, and every other one is the same of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mm.data.sample import Portion, Sample, Segment, grouped
from mm.plan.inputs import PlanInputs, supervised_tokens


class Span(NamedTuple):
    """Tokens start .. stop - 1 of a sample, counted behind its begin marker."""

    start: int
    stop: int


def truncated_sample(sample: Sample, inputs: PlanInputs) -> Sample | None:
    """The beginning of a sample that fits the context; None where nothing of it would be learned."""
    found, _ = spans(sample, inputs)
    if not found:
        return None
    short = truncated_to(sample, found[0], inputs)
    return short if supervised_tokens(short, inputs) else None


def truncated_to(sample: Sample, span: Span, inputs: PlanInputs) -> Sample:
    """A beginning of a sample."""
    return replace(sample, segments=_inside(sample, span, inputs)[0], truncated=True)


def split_sample(sample: Sample, inputs: PlanInputs) -> list[Sample]:
    """The portions of a sample of which something is learned, in order; none where an item is longer than
    the context."""
    found, whole = spans(sample, inputs)
    made = [(span, portion(sample, span, (0, 0), inputs)) for span in found if whole]
    kept = [span for span, one in made if supervised_tokens(one, inputs)]
    return [portion(sample, span, (n, len(kept)), inputs) for n, span in enumerate(kept, 1)]


def largest_item(sample: Sample, inputs: PlanInputs) -> int:
    """Tokens of the largest item of a sample, with the texts between its pieces."""
    every = (g for g in grouped(sample.segments) if not _is_text(g))
    return max((sum(_size(seg, inputs) for seg in group) for group in every), default=0)


def portion(sample: Sample, span: Span, nth: tuple[int, int], inputs: PlanInputs) -> Sample:
    """A portion of a sample. nth: its number, from 1 on, and how many there are."""
    segments, texts = _inside(sample, span, inputs)
    there = {seg.kind for seg in segments if seg.part is not None}
    # A text may depend on an item of another portion: here, nothing tells of it.
    free = (s if s.depends is None or s.depends in there else replace(s, depends=None) for s in segments)
    ends = span.stop == sum(_size(seg, inputs) for seg in sample.segments)
    return replace(sample, segments=tuple(free), truncated=not ends, portion=Portion(*nth, texts))


def spans(sample: Sample, inputs: PlanInputs) -> tuple[list[Span], bool]:
    """The tokens of all portions, and whether they are all: they end before an item that is longer than the
    context."""
    out, start, at = list[Span](), 0, 0
    room = inputs.context - 2 * sample.markers
    for group in grouped(sample.segments):
        n = sum(_size(seg, inputs) for seg in group)
        while at + n > start + room:
            stop = start + room if _is_text(group) else at
            if stop == start:
                return out, False
            out.append(Span(start, stop))
            start = stop
        at += n
    return [*out, Span(start, at)], True


def _inside(sample: Sample, span: Span, inputs: PlanInputs) -> tuple[tuple[Segment, ...], int]:
    """The segments in a span, and how many texts of the json end before it. One without a token belongs to
    the portion that ends where it stands."""
    out, texts, at = list[Segment](), 0, 0
    for group in grouped(sample.segments):
        n = sum(_size(seg, inputs) for seg in group)
        first, last = max(span.start - at, 0), min(span.stop - at, n)
        if first < last if n else span.start < at <= span.stop or at == span.start == 0:
            whole = last - first == n
            out += group if whole else [_tokens(group[0], first, last - first)]
        elif at + n <= span.start:
            texts += _is_text(group)
        at += n
    return tuple(out), texts


def _size(seg: Segment, inputs: PlanInputs) -> int:
    return seg.tokens if seg.part is None else inputs.rows(seg.kind, seg.part)


def _is_text(group: Sequence[Segment]) -> bool:
    """Whether it is a text of the json; texts between pieces of an item are of its group."""
    return len(group) == 1 and group[0].part is None


def _tokens(seg: Segment, first: int, n: int) -> Segment:
    return replace(seg, tokens=n, written=seg.tokens, first=first)
