"""The items of an index as their encoders take them apart. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from encoders.contract import Encoder
from mm.data.columns.samples import Samples
from mm.data.sample import Index
from mm.data.tokenizer import AnyTokenizer
from mm.plan.fitted import Fitted
from mm.plan.inputs import EncoderUse, PlanInputs
from mm.plan.item_pieces import in_pieces

NOTHING = Encoder.omits.__func__  # type: ignore[attr-defined]  # of encoders that leave out nothing


def with_pieces(index: Index, inputs: PlanInputs, tokenizer: AnyTokenizer) -> Index:
    """The index with items as their encoders' pieces, and texts between them in the tokenizer's ids.

    An item that its encoder cannot take stays as it is. Texts are encoded once each. Samples in columns are
    taken apart when they are asked for.
    """
    known: dict[str, tuple[int, ...]] = {}

    def encode(text: str) -> tuple[int, ...]:
        if text not in known:
            known[text] = tuple(tokenizer.encode_texts([text])[0])
        return known[text]

    if isinstance(index.samples, Samples):
        return replace(index, samples=Fitted(index.samples, inputs, encode))
    return replace(index, samples=tuple(in_pieces(s, inputs.encoders, encode) for s in index.samples))


def omissions(index: Index, uses: Mapping[str, EncoderUse]) -> list[str]:
    """What encoders leave out of items, a line for each kind with how many items it is of.

    O(items), unless no encoder leaves out anything.
    """
    found: Counter[tuple[str, str]] = Counter()
    every: Counter[str] = Counter()
    some = [m for m, use in uses.items() if getattr(use.cls.omits, "__func__", None) is not NOTHING]
    for sample in index.usable if some else ():
        for seg in sample.segments:
            if seg.part is not None and seg.kind in some:
                use = uses[seg.kind]
                every[seg.kind] += 1
                found[seg.kind, use.cls.omits(use.cfg, seg.part.meta)] += 1
    return [f"{n} of {every[m]} items of {m}: {what}" for (m, what), n in sorted(found.items()) if what]
