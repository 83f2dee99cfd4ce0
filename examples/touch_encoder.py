"""A plug-in encoder that may be split over cp and pipeline stages: frames of a pressure pad, in .npy files.

    model:
      touch: {encoder: "examples.touch_encoder:TouchEncoder", projector: {hidden: 64}, options: {side: 4}}

Each frame gives one row. These layers see one frame at a time. For layers that see more of an item than a
rank holds, encoders.api has ItemAttention and ItemConvolution.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from encoders.api import Encoder, Features, Linear, Share, normal, whole


@dataclass(frozen=True)
class TouchConfig:
    """side: of a frame, in sensors; width: of hidden states and features; depth: layers."""

    side: int = 4
    width: int = 24
    depth: int = 4


class TouchEncoder(Encoder):
    Config = TouchConfig
    context_parallel = True
    pipeline = True

    def __init__(self, cfg, axes, *, stage=None, device=None, dtype=None):
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg, self.axes, self.stage = cfg, axes, stage or whole(cfg.depth)
        options = {"bias": True, "device": device, "dtype": dtype}
        if self.stage.first:
            self.stem = Linear(cfg.side**2, cfg.width, normal(cfg.side**-1.0), **options)
        std = cfg.width**-0.5
        layers = {str(i): Linear(cfg.width, cfg.width, normal(std), **options) for i in self.stage.layers}
        self.blocks = nn.ModuleDict(layers)  # under their global index, in any stage

    @property
    def layers(self):
        return list(self.blocks.values())

    @classmethod
    def feature_width(cls, cfg):
        return cfg.width

    @classmethod
    def layer_count(cls, cfg):
        return cfg.depth

    @classmethod
    def hidden_width(cls, cfg, layer):
        return cfg.width

    @classmethod
    def rows(cls, cfg, meta):
        return meta["dim0"]

    @classmethod
    def cost(cls, cfg, meta):
        return 2.0 * meta["dim0"] * cfg.width * (cfg.side**2 + cfg.depth * cfg.width)

    @classmethod
    def input_shape(cls, cfg):
        return (cfg.side**2,)

    @classmethod
    def prepare(cls, cfg, payload, meta):
        frames = torch.from_numpy(np.load(io.BytesIO(payload), allow_pickle=False)).float()
        return frames.reshape(-1, cfg.side**2)

    def forward(self, batch, hidden=None):
        rows = tuple(self.rows(self.cfg, meta) for meta in batch.metas)  # of all items of the dp rank
        share = Share.of(rows, self.axes)  # share.part: the rows of this rank
        if hidden is None:  # the first stage; batch.values begin with item number batch.first
            start = share.part[0] - sum(rows[: batch.first])
            hidden = self.stem(batch.values[start : start + share.kept])
        for block in self.layers:
            hidden = hidden + F.gelu(block(hidden))
        return Features(hidden, rows, share.part[0]) if self.stage.last else hidden
