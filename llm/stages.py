"""Pipeline stages of the language model: its layers partitioned, and what a stage shares or reads. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from llm.config import LLMConfig, embeds_last
from llm.flops import head_flops, layer_costs
from parallel.topology.layout import Unfit
from parallel.topology.stage import Stage, partition_layers, stages_of, whole


def partition(cfg: LLMConfig, n: int, lengths: Sequence[int] = (4096,)) -> tuple[Stage, ...]:
    """The layers in n stages: at the pattern's |, else so that the costliest stage is as cheap as possible.

    lengths: tokens of the documents in a typical packed sequence, for which costs are computed. Raises
    ValueError for a pattern with another number of stages (one stage takes any pattern), and for more stages
    than layers.
    """
    parts = cfg.pattern.split("|")
    if n == 1:
        return (whole(len(cfg.symbols)),)
    if len(parts) == 1:
        return partition_layers(layer_costs(cfg, lengths), n, after=head_flops(cfg, lengths))
    if len(parts) != n:
        raise Unfit(
            f"model.llm.pattern {cfg.pattern!r} has {len(parts)} stages, the layout {n} (pp * vpp); needed: "
            "as many, or a pattern without |",
            [{"pp": len(parts), "vpp": 1}, {"pattern": cfg.symbols}],
            "llm",
        )
    edges = [0]
    for part in parts:
        edges.append(edges[-1] + len(part))
    return stages_of(edges)


def entering_levels(cfg: LLMConfig, stages: Sequence[Stage], levels: int) -> dict[int, tuple[int, ...]]:
    """By index of a stage, ascending: which of an encoder's `levels` levels of rows enter there.

    Level 0 enters at the embedding, the others after their layers. Stages without a level are left out.
    """
    out: dict[int, tuple[int, ...]] = {}
    for i, stage in enumerate(stages):
        found = levels_of(cfg, stage)
        if any(k < levels for k in found):
            out[i] = tuple(k for k in found if k < levels)
    return out


def levels_of(cfg: LLMConfig, stage: Stage) -> tuple[int, ...]:
    """The levels of encoder rows that enter at `stage`, ascending."""
    later = (k for k, after in enumerate(cfg.level_layers, start=1) if after in stage.layers)
    return (*((0,) if stage.first else ()), *later)


def shared_parameters(cfg: LLMConfig, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Parameters that the first and the last stage both hold: their gradients are summed over the two."""
    return ("embed.weight",) if len(stages) > 1 and embeds_last(cfg) else ()
