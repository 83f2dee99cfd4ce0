"""A plug-in encoder around a module that others wrote: SigLIP of the transformers package, for a module
called `vision` (or anything else). Needs pip install transformers.

    model:
      vision: {encoder: "examples.siglip_encoder:SiglipEncoder", options: {folder: siglip-base-patch16-224}}

With `folder` it is a downloaded model. Without, the options give the sizes, and the weights follow from the
run's seed. Pictures are resized to the model's size; each gives one row for every patch. It declares no way
to be split, so every tp rank runs it whole.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from encoders.api import Encoder, Features, adopt


@dataclass(frozen=True)
class SiglipOptions:
    """folder: of a downloaded model, or "" for new weights. The sizes must be those of the folder's model,
    because rows are counted before anything is loaded.

    image, patch: sides in pixels; width: of hidden states and features; mlp: hidden width of the MLPs; depth:
    layers; heads: attention heads.
    """

    folder: str = ""
    image: int = 16
    patch: int = 4
    width: int = 32
    mlp: int = 64
    depth: int = 2
    heads: int = 4


class SiglipEncoder(Encoder):
    Config = SiglipOptions

    def __init__(self, cfg, axes, *, device=None, dtype=None):
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg = cfg
        self.inner = adopt(siglip(cfg), device=device, dtype=dtype)  # the only line that wrapping adds

    @property
    def layers(self):
        return list(self.inner.encoder.layers)

    @classmethod
    def feature_width(cls, cfg):
        return cfg.width

    @classmethod
    def rows(cls, cfg, meta):
        return (cfg.image // cfg.patch) ** 2

    @classmethod
    def cost(cls, cfg, meta):
        n = cls.rows(cfg, meta)
        layer = 2 * n * cfg.width * (4 * cfg.width + 2 * cfg.mlp) + 4 * n * n * cfg.width
        return float(cfg.depth * layer + 2 * n * cfg.width * 3 * cfg.patch**2)

    @classmethod
    def input_shape(cls, cfg):
        return (3, cfg.image, cfg.image)

    @classmethod
    def prepare(cls, cfg, payload, meta):
        picture = Image.open(io.BytesIO(payload)).convert("RGB").resize((cfg.image, cfg.image))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0

    def forward(self, batch):
        pictures = batch.values
        if not len(pictures):  # no items on this rank: SigLIP cannot run on none, so it runs on zeros
            pictures = pictures.new_zeros((1, *self.input_shape(self.cfg)))
        rows = tuple(self.rows(self.cfg, meta) for meta in batch.metas)
        values = self.inner(pixel_values=pictures).last_hidden_state.flatten(0, 1)
        return Features(values[: sum(rows)], rows)


def siglip(cfg):
    """The wrapped model, without its pooling head."""
    if cfg.folder:
        return SiglipVisionModel.from_pretrained(cfg.folder, vision_use_head=False)
    sizes = {"hidden_size": cfg.width, "intermediate_size": cfg.mlp, "num_hidden_layers": cfg.depth}
    sizes |= {"num_attention_heads": cfg.heads, "image_size": cfg.image, "patch_size": cfg.patch}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
