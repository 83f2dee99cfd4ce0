"""Which layers of an encoder are trained, and what their backward costs. Pure."""

from __future__ import annotations

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from parallel.topology.stage import Stage, whole


def trained_share(blueprint: Blueprint, module: str, stage: Stage) -> float:
    """The share of an encoder's layers in `stage` that have a backward.

    1 where some layers are frozen of an encoder without pipeline stages, which only knows them once it is
    built: its backward is then rated too dear.
    """
    enc, cls = blueprint.cfg.model[module], blueprint.inputs.encoders[module].cls
    if enc.freeze in ("encoder", "all"):
        return 0.0
    frozen = enc.freeze_layers if cls.pipeline else 0
    return 1.0 - min(max(frozen - stage.start, 0) / len(stage.layers), 1.0)


def trained_below(blueprint: Blueprint, module: str, stage: int) -> bool:
    """Whether stages before number `stage` have weights to train, so that what enters it needs a gradient."""
    if module == SINK:
        return True
    enc, start = blueprint.cfg.model[module], blueprint.stages[module][stage].start
    return enc.freeze not in ("encoder", "all") and enc.freeze_layers < start


def step_factors(blueprint: Blueprint, module: str) -> tuple[float, float]:
    """Forward and backward as multiples of the forward's FLOPs: of an encoder, of its projectors.

    A backward costs one forward for the inputs and one for the weights. Frozen layers have none where nothing
    below them is trained; what comes before the layers counts as they do.
    """
    share = trained_share(blueprint, module, whole(blueprint.stages[module][-1].stop))
    learns = blueprint.cfg.model[module].freeze in ("none", "encoder")
    return 1.0 + 2.0 * share, 1.0 + (share > 0) + learns
