"""Pipeline stages of the language model: where its layers are cut, and what a stage shares or reads. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from llm.config import LLMConfig, embeds_last, head_flops, layer_costs
from parallel.layout import Unfit
from parallel.stage import Stage, cut_layers, stages_of, whole


def cut(cfg: LLMConfig, n: int, lengths: Sequence[int] = (4096,)) -> tuple[Stage, ...]:
    """The model in n stages: where the pattern says, else so that the costliest stage is cheapest.

    lengths: documents of a typical packed sequence, tokens, which costs are reckoned for. Raises ValueError
    for a pattern with another number of stages (one stage takes any pattern), or more stages than layers.
    """
    parts = cfg.pattern.split("|")
    if n == 1:
        return (whole(len(cfg.symbols)),)
    if len(parts) == 1:
        return cut_layers(layer_costs(cfg, lengths), n, after=head_flops(cfg, lengths))
    if len(parts) != n:
        raise Unfit(
            f"model.llm.pattern {cfg.pattern!r} has {len(parts)} stages, the layout {n} (pp * vpp); needed: "
            "as many, or a pattern without |",
            [{"pp": len(parts), "vpp": 1}, {"pattern": cfg.symbols}],
            "llm",
        )
    cuts = [0]
    for part in parts:
        cuts.append(cuts[-1] + len(part))
    return stages_of(cuts)


def reading_stages(cfg: LLMConfig, stages: Sequence[Stage]) -> tuple[int, ...]:
    """Indices of the stages that encoder rows enter: the first, and those that add further levels."""
    out = {0} | {i for i, stage in enumerate(stages) if any(k in stage.layers for k in cfg.level_layers)}
    return tuple(sorted(out))


def shared_parameters(cfg: LLMConfig, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Parameters that the first and the last stage both hold: their gradients are summed over the two."""
    return ("embed.weight",) if len(stages) > 1 and embeds_last(cfg) else ()
