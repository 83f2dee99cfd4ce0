"""The options of a vision transformer: switches by which the published families differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from encoders.activations import Activation

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

Norm = Literal["layer", "rms"]
Rope = Literal["none", "axial", "alternating", "centred"]

Fit = Literal["exact", "crop", "smart", "patches", "budget", "tiles", "longest", "none"]
Interpolation = Literal[
    "bicubic", "bicubic_single", "bicubic_antialias", "bilinear_antialias", "longer_side", "corners"
]


@dataclass(frozen=True)
class Pictures:
    """What is made of a picture before its patches, as the family's image processor does it.

    fit: exact: resized to height x width. crop: resized until its shorter side is `edge`, then height x width
        from the centre. smart: each side rounded to whole blocks, the area between least and most pixels
        (Qwen). patches: at most `most` patches at its own aspect (SigLIP2). budget: least to most patches at
        its own aspect (Nemotron Omni). longest: whole patches, smaller where a side is longer than `edge`
        (Pixtral). tiles: the grid of least to most tiles nearest to its aspect, each tile height x width and
        an item of its own (InternVL). none: as it is, less what is left over of a
        patch.
    height, width: in pixels, of exact, crop and tiles.
    edge: in pixels, of crop and longest.
    least, most: pixels of smart; patches of budget; tiles of tiles; most: patches of patches.
    thumbnail: whether the whole picture, as large as a tile, follows several tiles.
    tile_tag, thumbnail_tag: text before each tile and before the thumbnail, with {n}, {row} and {column} for
        the tile's numbers from 1 on.
    resample: bilinear or bicubic.
    after_scale: whether it is resized as numbers in [0, 1] (DINOv3), not as 8-bit pixels.
    mean, std: of each channel, of pixels in [0, 1].
    """

    fit: Fit = "exact"
    height: int = 224
    width: int = 224
    edge: int = 224
    least: int = 1
    most: int = 1
    thumbnail: bool = True
    tile_tag: str = ""
    thumbnail_tag: str = ""
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    after_scale: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF


@dataclass(frozen=True)
class Videos:
    """Which frames of a video are taken, and what is made of them.

    sample: all: every frame. ends: `fps` a second, the first and the last among them (Qwen3-VL). stride: the
        same from the first on at equal steps, a whole number of tubelets (Qwen2.5-VL).
    fps: frames taken a second. A video that does not say its own is taken to have as many.
    least_frames, most_frames: of ends and stride.
    area: what least and most count where pictures.fit is smart: the pixels of a frame or of all frames.
    least, most: pixels. Other families bring each frame to a size as they do a picture.
    cap: most pixels of a frame where area is all; 0 for no such bound.
    frame_tag, frame_end: text before and after the frames of each tubelet, with {seconds} for their time. If
        there is one, each tubelet is an item of its own.
    """

    sample: Literal["all", "ends", "stride"] = "all"
    fps: float = 2.0
    least_frames: int = 4
    most_frames: int = 768
    area: Literal["frame", "all"] = "frame"
    least: int = 1
    most: int = 1
    cap: int = 0
    frame_tag: str = ""
    frame_end: str = ""


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and switches of a vision transformer. Each family has defaults of its own.

    patch: side of a patch, in pixels.
    channels: 1 (grey) or 3 (colour).
    frames: pictures of a video that a patch spans; a still picture is repeated.
    channels_last: whether a patch lists the channels of each pixel, not the pixels of each channel.
    width: of hidden states.
    heads: attention heads; they divide width.
    layers: blocks.
    mlp: hidden width of the MLP.
    activation: gelu, gelu_tanh, quick_gelu, silu or relu2.
    gated: whether the MLP multiplies by a second linear map of its input.
    norm: layer (LayerNorm) or rms.
    eps: of the norms.
    biases: which linear maps have a bias: patch, q, k, v, out, mlp.
    class_tokens, registers: learned tokens before each picture's patches. They see the patches and are seen.
    pre_norm, final_norm: whether a norm comes before the first and after the last block.
    layer_scale: whether each branch is multiplied by a learned vector.
    table: side of the square table of learned positions, in patches; 0 for none.
    class_position: whether the class token has a position of its own, the first.
    interpolation: how the table is made to fit another grid, in float32 but for bicubic. longer_side: that
        of a square as long as the longer side, cut. corners: bilinear, the corners of both at one place.
    rope: none; axial: rotary angles by row and column; alternating: with every other frequency of one list
        for rows, the rest for columns (Pixtral); centred: by coordinates in [-1, 1] (DINOv3).
    rope_base: base of the rotary frequencies.
    single: whether rotation and RMS norms are float32 in a float64 model too, as in the family's own code.
    single_rotation: whether that goes for rotation too, not only for norms.
    merge: side of the squares of patches that make one row.
    merged: width of the rows that an MLP makes of the merged patches; 0: they are left side by side.
    levels: indices of earlier layers whose outputs are features too (DeepStack).
    window: side of the windows of attention, in patches; 0 for none.
    full_layers: layers whose attention knows no windows.
    prefix_rows: whether class tokens and registers are rows too, before those of the patches.
    pictures: what is made of a picture first.
    videos: what is made of a video first.
    tokens_per_second: positions in time, of a language model with three axes, for each second of a video
        (Qwen2.5-VL); 0: one a tubelet.
    """

    patch: int = 16
    channels: int = 3
    frames: int = 1
    channels_last: bool = False
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp: int = 3072
    activation: Activation = "gelu"
    gated: bool = False
    norm: Norm = "layer"
    eps: float = 1e-6
    biases: tuple[str, ...] = ("patch", "q", "k", "v", "out", "mlp")
    class_tokens: int = 0
    registers: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    table: int = 0
    class_position: bool = False
    interpolation: Interpolation = "bicubic"
    rope: Rope = "none"
    rope_base: float = 10000.0
    single: bool = False
    single_rotation: bool = True
    merge: int = 1
    merged: int = 0
    levels: tuple[int, ...] = ()
    window: int = 0
    full_layers: tuple[int, ...] = ()
    prefix_rows: bool = False
    pictures: Pictures = field(default_factory=Pictures)
    videos: Videos = field(default_factory=Videos)
    tokens_per_second: int = 0

    @property
    def prefix(self) -> int:
        """Tokens of a picture before its patches."""
        return self.class_tokens + self.registers

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.heads

    @property
    def inputs(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def side(self) -> int:
        """Side of the square of pixels that makes one row."""
        return self.patch * self.merge
