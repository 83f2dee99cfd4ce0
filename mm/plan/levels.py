"""Which layers of the language model the levels of encoders' rows enter after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llm.config import LLMConfig
from parallel.topology.layout import Changes, Unfit

if TYPE_CHECKING:
    from mm.plan.inputs import EncoderUse


def check_levels(uses: Mapping[str, EncoderUse], llm: LLMConfig) -> None:
    """Refuse levels of rows that enter no layer, and layers that no level enters."""
    # The first level enters with the tokens; each other one enters after a layer of its own.
    after_layers = {m: use.cls.feature_levels(use.cfg) - 1 for m, use in uses.items()}
    layers, most = llm.level_layers, max(after_layers.values(), default=0)
    for name, n in after_layers.items():
        if n > len(layers):
            raise Unfit(
                f"model.{name} gives {n + 1} levels of rows, but model.llm.level_layers names "
                f"{len(layers)} layers; needed: one for each level after the first",
                _other_levels(layers, most, len(llm.symbols)),
            )
    if len(layers) > most:
        raise Unfit(
            f"model.llm.level_layers names {len(layers)} layers, but no encoder gives more than {most} "
            "levels of rows after the first, so the rest would have no effect",
            _other_levels(layers, most, len(llm.symbols)),
        )


def _other_levels(layers: Sequence[int], n: int, of: int) -> list[Changes]:
    """Changes that give n of the model's `of` layers to levels, the layers that are named already first."""
    more = [*layers, *(k for k in range(of) if k not in layers)]
    return [{"model.llm.level_layers": more[:n]}] if n <= len(more) else []
