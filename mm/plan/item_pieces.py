"""One item as its encoder takes it apart: tiles of a picture, frames of a video, texts between. Pure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mm.data.sample import Part, Sample, Segment
from mm.plan.inputs import EncoderUse

Encode = Callable[[str], tuple[int, ...]]


def in_pieces(sample: Sample, uses: Mapping[str, EncoderUse], encode: Encode) -> Sample:
    """A sample with its items as their encoders' pieces; the same where none is taken apart."""
    out: list[Segment] = []
    for seg in sample.segments:
        out += [seg] if seg.part is None or seg.kind not in uses else item_pieces(seg, seg.part, uses, encode)
    same = len(out) == len(sample.segments) and all(map(operator.is_, out, sample.segments))
    return sample if same else replace(sample, segments=tuple(out))


def item_pieces(seg: Segment, part: Part, uses: Mapping[str, EncoderUse], encode: Encode) -> list[Segment]:
    """The segments that an item becomes; an item that its encoder cannot take stays as it is."""
    try:
        found = pieces_of(uses[seg.kind], part.meta)
    except (ValueError, KeyError):  # rows() refuses it in words later
        return [seg]
    out: list[Segment] = []
    for k, piece in enumerate(found):
        more = k + 1 < len(found)
        if isinstance(piece, str):
            ids = encode(piece)
            out.append(Segment("text", len(ids), None, False, None, ids=ids, more=more))
        elif len(found) == 1 and piece == part.meta:
            return [seg]
        else:
            own = replace(part, meta={**piece, "piece": k})
            out.append(replace(seg, part=own, more=more))
    return out


def pieces_of(use: EncoderUse, meta: Mapping[str, Any]) -> list[str | Mapping[str, Any]]:
    """What an item becomes: texts, and metadata of items. Raises ValueError as the encoder's rows() does."""
    found = list(use.cls.pieces(use.cfg, meta))
    if not any(not isinstance(piece, str) for piece in found):
        raise ValueError(f"{use.cls.__name__}.pieces gave no item for {dict(meta)}; needed: one at least")
    return found
