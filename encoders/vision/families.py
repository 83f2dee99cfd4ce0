"""Published vision encoders: the switches of each, as defaults of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from encoders.registry import register
from encoders.vision.config import VisionConfig
from encoders.vision.model import VisionTransformer


@dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """SigLIP (arXiv 2303.15343)."""

    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu2"] = "gelu_tanh"
    table: int = 14


@register("siglip")
class Siglip(VisionTransformer):
    """SigLIP's vision tower, without its pooling head."""

    Config = SiglipConfig
