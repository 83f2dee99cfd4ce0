"""Items as their encoders take them apart: tiles of a picture, frames of a video, texts between. Pure."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mm.data.sample import Index, Part, Sample, Segment
from mm.data.tokenizer import AnyTokenizer
from mm.plan.inputs import EncoderUse

Encode = Callable[[str], tuple[int, ...]]


def with_pieces(index: Index, uses: Mapping[str, EncoderUse], tokenizer: AnyTokenizer) -> Index:
    """The index with items as their encoders' pieces, and texts between them in the tokenizer's ids.

    An item that its encoder cannot take stays as it is. O(items), texts are encoded once each.
    """
    known: dict[str, tuple[int, ...]] = {}

    def encode(text: str) -> tuple[int, ...]:
        if text not in known:
            known[text] = tuple(tokenizer.encode_texts([text])[0])
        return known[text]

    return replace(index, samples=tuple(_in_pieces(s, uses, encode) for s in index.samples))


def _in_pieces(sample: Sample, uses: Mapping[str, EncoderUse], encode: Encode) -> Sample:
    out: list[Segment] = []
    for seg in sample.segments:
        out += [seg] if seg.part is None or seg.kind not in uses else _pieces(seg, seg.part, uses, encode)
    same = len(out) == len(sample.segments) and all(map(operator.is_, out, sample.segments))
    return sample if same else replace(sample, segments=tuple(out))


def _pieces(seg: Segment, part: Part, uses: Mapping[str, EncoderUse], encode: Encode) -> list[Segment]:
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


def omissions(index: Index, uses: Mapping[str, EncoderUse]) -> list[str]:
    """What encoders leave out of items, a line for each kind with how many items it is of. O(items)."""
    found: Counter[tuple[str, str]] = Counter()
    every: Counter[str] = Counter()
    for sample in index.usable:
        for seg in sample.segments:
            if seg.part is not None and seg.kind in uses:
                use = uses[seg.kind]
                every[seg.kind] += 1
                found[seg.kind, use.cls.omits(use.cfg, seg.part.meta)] += 1
    return [f"{n} of {every[m]} items of {m}: {what}" for (m, what), n in sorted(found.items()) if what]
