"""Published vision encoders: the switches of each, as defaults of its options."""

from __future__ import annotations

from dataclasses import dataclass, field

from encoders.activations import Activation
from encoders.registry import register
from encoders.vision.config import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    Norm,
    Pictures,
    Rope,
    Videos,
    VisionConfig,
)
from encoders.vision.model import VisionTransformer

NO_PATCH_BIAS = ("q", "k", "v", "out", "mlp")


@dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """SigLIP (arXiv 2303.15343)."""

    activation: Activation = "gelu_tanh"
    table: int = 14


@register("siglip")
class Siglip(VisionTransformer):
    """SigLIP's vision tower, without its pooling head."""

    Config = SiglipConfig


@dataclass(frozen=True)
class Siglip2Config(VisionConfig):
    """SigLIP 2 at native aspect, "NaFlex" (arXiv 2502.14786)."""

    activation: Activation = "gelu_tanh"
    channels_last: bool = True
    table: int = 16
    interpolation: Interpolation = "bilinear_antialias"
    pictures: Pictures = field(default_factory=lambda: Pictures("patches", most=256, resample="bilinear"))


@register("siglip2")
class Siglip2(VisionTransformer):
    """SigLIP 2's vision tower, without its pooling head."""

    Config = Siglip2Config


@dataclass(frozen=True)
class ClipConfig(VisionConfig):
    """CLIP (arXiv 2103.00020). Its last hidden state is before the final norm, which is for pooling alone."""

    activation: Activation = "quick_gelu"
    eps: float = 1e-5
    biases: tuple[str, ...] = NO_PATCH_BIAS
    class_tokens: int = 1
    class_position: bool = True
    pre_norm: bool = True
    final_norm: bool = False
    table: int = 14
    pictures: Pictures = field(default_factory=lambda: Pictures("crop", mean=CLIP_MEAN, std=CLIP_STD))


@register("clip")
class Clip(VisionTransformer):
    """CLIP's vision tower."""

    Config = ClipConfig


@dataclass(frozen=True)
class ImageViTConfig(VisionConfig):
    """The vision transformer of ViTModel (arXiv 2010.11929)."""

    eps: float = 1e-12
    class_tokens: int = 1
    class_position: bool = True
    table: int = 14
    pictures: Pictures = field(default_factory=lambda: Pictures(resample="bilinear"))


@register("image_vit")
class ImageViT(VisionTransformer):
    """The vision transformer of image classification; `vit` is this repository's own."""

    Config = ImageViTConfig


@dataclass(frozen=True)
class Dinov2Config(VisionConfig):
    """DINOv2 (arXiv 2304.07193), perhaps with registers (arXiv 2309.16588)."""

    patch: int = 14
    class_tokens: int = 1
    class_position: bool = True
    layer_scale: bool = True
    table: int = 16
    interpolation: Interpolation = "bicubic_single"
    pictures: Pictures = field(
        default_factory=lambda: Pictures("crop", edge=256, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    )


@register("dinov2")
class Dinov2(VisionTransformer):
    """DINOv2; with registers its table is resized by bicubic_antialias."""

    Config = Dinov2Config


@dataclass(frozen=True)
class Dinov3Config(VisionConfig):
    """DINOv3's vision transformers (arXiv 2508.10104)."""

    eps: float = 1e-5
    biases: tuple[str, ...] = ("patch", "q", "v", "out", "mlp")
    class_tokens: int = 1
    registers: int = 4
    layer_scale: bool = True
    rope: Rope = "centred"
    rope_base: float = 100.0
    pictures: Pictures = field(
        default_factory=lambda: Pictures(
            resample="bilinear", after_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
    )


@register("dinov3")
class Dinov3(VisionTransformer):
    """DINOv3's vision transformers."""

    Config = Dinov3Config


@dataclass(frozen=True)
class RadioConfig(VisionConfig):
    """RADIO (arXiv 2412.07679): class tokens and registers are one list, the table is cut to the aspect."""

    width: int = 1280
    heads: int = 16
    layers: int = 32
    mlp: int = 5120
    biases: tuple[str, ...] = NO_PATCH_BIAS
    class_tokens: int = 10
    final_norm: bool = False
    table: int = 128
    interpolation: Interpolation = "longer_side"
    pictures: Pictures = field(default_factory=lambda: Pictures("none", mean=CLIP_MEAN, std=CLIP_STD))


@register("radio")
class Radio(VisionTransformer):
    """RADIO, with its input conditioner as the mean and std of pictures."""

    Config = RadioConfig


@dataclass(frozen=True)
class InternVLConfig(VisionConfig):
    """InternViT of InternVL 2.5 and 3 (arXiv 2412.05271), for pictures in tiles."""

    patch: int = 14
    width: int = 1024
    heads: int = 16
    layers: int = 24
    mlp: int = 4096
    biases: tuple[str, ...] = ("patch", "out", "mlp")
    class_tokens: int = 1
    class_position: bool = True
    final_norm: bool = False
    layer_scale: bool = True
    table: int = 32
    pictures: Pictures = field(
        default_factory=lambda: Pictures("tiles", 448, 448, most=12, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    )


@register("internvl")
class InternVL(VisionTransformer):
    """InternVL's vision tower; with `merge: 2` its pixel shuffle."""

    Config = InternVLConfig


@dataclass(frozen=True)
class PixtralConfig(VisionConfig):
    """Pixtral's vision tower (arXiv 2410.07073)."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    mlp: int = 4096
    activation: Activation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    eps: float = 1e-5
    biases: tuple[str, ...] = ()
    pre_norm: bool = True
    final_norm: bool = False
    rope: Rope = "alternating"
    single: bool = True
    single_rotation: bool = False
    pictures: Pictures = field(
        default_factory=lambda: Pictures("longest", edge=1024, mean=CLIP_MEAN, std=CLIP_STD)
    )


@register("pixtral")
class Pixtral(VisionTransformer):
    """Pixtral's vision tower, at native aspect."""

    Config = PixtralConfig


QWEN_PICTURES = Pictures("smart", least=56 * 56, most=28 * 28 * 1280, mean=CLIP_MEAN, std=CLIP_STD)


@dataclass(frozen=True)
class Qwen25VLConfig(VisionConfig):
    """Qwen2.5-VL's vision tower (arXiv 2502.13923), with its merger."""

    patch: int = 14
    frames: int = 2
    width: int = 1280
    heads: int = 16
    layers: int = 32
    mlp: int = 3420
    activation: Activation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    biases: tuple[str, ...] = NO_PATCH_BIAS
    final_norm: bool = False
    rope: Rope = "axial"
    single: bool = True
    merge: int = 2
    merged: int = 3584
    window: int = 8
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    pictures: Pictures = QWEN_PICTURES
    videos: Videos = field(default_factory=lambda: Videos(least=128 * 28 * 28, most=768 * 28 * 28))
    tokens_per_second: int = 4


@register("qwen2_5_vl")
class Qwen25VL(VisionTransformer):
    """Qwen2.5-VL's vision tower: rows are those of its merger."""

    Config = Qwen25VLConfig


@dataclass(frozen=True)
class Qwen3VLConfig(VisionConfig):
    """Qwen3-VL's vision tower (arXiv 2511.21631), with its mergers, one for each DeepStack level."""

    patch: int = 16
    frames: int = 2
    width: int = 1152
    heads: int = 16
    layers: int = 27
    mlp: int = 4304
    activation: Activation = "gelu_tanh"
    final_norm: bool = False
    table: int = 48
    interpolation: Interpolation = "corners"
    rope: Rope = "axial"
    single: bool = True
    merge: int = 2
    merged: int = 3584
    levels: tuple[int, ...] = ()
    pictures: Pictures = field(default_factory=lambda: Pictures("smart", least=256 * 256, most=4096 * 4096))
    videos: Videos = field(
        default_factory=lambda: Videos(
            "ends",
            area="all",
            least=128 * 32 * 32,
            most=768 * 32 * 32,
            frame_tag="<{seconds} seconds><|vision_start|>",
            frame_end="<|vision_end|>",
        )
    )


@register("qwen3_vl")
class Qwen3VL(VisionTransformer):
    """Qwen3-VL's vision tower, and Qwen3.5's, which has no levels: rows are those of its mergers."""

    Config = Qwen3VLConfig
