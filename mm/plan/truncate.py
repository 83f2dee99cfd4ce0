"""A sample of which only the beginning is used. Pure."""

from __future__ import annotations

from dataclasses import replace

from mm.data.sample import Sample, Segment, grouped
from mm.plan.inputs import PlanInputs, supervised_tokens


def truncated_sample(sample: Sample, inputs: PlanInputs) -> Sample | None:
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
