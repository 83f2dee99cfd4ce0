"""The config of made-up samples: `data.synthetic`."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field

from mm.config.build import Section, unknown_key
from mm.errors import Refused

MARKERS = 2  # a begin and an end marker are part of a sample


class SyntheticItems(Section):
    """The items of one encoder in every made-up sample."""

    count: int = Field(ge=0, description="items of encoder X in each made-up sample")
    rows: int = Field(ge=1, description="rows that each of them has at the language model")


class SyntheticConfig(Section):
    """Samples of one kind, for plans and virtual steps."""

    length: int | None = Field(
        None, ge=3, description="tokens of each made-up sample, rows included; by default data.context"
    )
    items: dict[str, SyntheticItems] = Field(
        {}, description="by encoder, the items of a made-up sample; the rest of it is text"
    )


def check_synthetic(given: SyntheticConfig, context: int, encoders: Collection[str]) -> None:
    """Refuse made-up samples of unknown encoders, or whose items do not fit their length."""
    length = given.length or context
    if length > context:
        raise Refused(
            f"data.synthetic.length={length} is longer than the longest sample, data.context={context}; "
            f"nearest: data.context={length}"
        )
    for name in given.items:
        if name not in encoders:
            raise Refused(unknown_key(f"data.synthetic.items.{name}", name, sorted(encoders)))
    rows = sum(one.count * one.rows for one in given.items.values())
    if rows + MARKERS >= length:
        raise Refused(
            f"data.synthetic has {rows} rows of items in samples of {length} tokens; needed: at most "
            f"{length - MARKERS - 1}, which leaves room for two markers and a token of text"
        )
