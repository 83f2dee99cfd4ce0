"""The metric of arXiv 2605.27678 under its own name, TFLOPS a device. It leaves attention's products out."""

from __future__ import annotations

from encoders.vision.config import VisionConfig
from encoders.vit import ViTConfig
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan


def parameters(layers: int, width: int) -> float:
    """N of a dense transformer as the metric counts it, without its vocabulary: 12 h^2 + 4 h a layer."""
    return layers * (12.0 * width**2 + 4.0 * width)


def paper_flops(blueprint: Blueprint, plan: StepPlan) -> float | None:
    """FLOPs of a step by that metric: 6 N for each token, those of images once more with the encoder's own N.

    N of the language model has its vocabulary once more by its width. None for models that are no dense
    transformers with vision transformers.
    """
    llm = blueprint.llm
    if set(llm.symbols) - {"*", "-"} or llm.symbols.count("*") != llm.symbols.count("-"):
        return None
    own = parameters(llm.symbols.count("*"), llm.d_model) + llm.vocab_size * llm.d_model
    total = 6 * own * plan.tokens
    for module, items in plan.items.items():
        use = blueprint.inputs.encoders[module]
        if not isinstance(use.cfg, ViTConfig | VisionConfig):
            return None
        tokens = float(items.columns.rows.sum()) * use.cls.tokens_per_row(use.cfg)
        total += 6 * parameters(use.cfg.layers, use.cfg.width) * tokens
    return total
