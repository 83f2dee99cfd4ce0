"""A plug-in encoder: time series in .npy files, for a module called `sensor` (or anything else).

    model:
      sensor: {encoder: "examples.sensor_encoder:SensorEncoder", options: {channels: 3}}

It declares no way to be split, so every tp rank runs it whole. Each `stride` points of a series give one row.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from encoders.api import Encoder, Features, Linear, normal


@dataclass(frozen=True)
class SensorConfig:
    """channels: values a point; stride: points a row; width: features a row."""

    channels: int = 3
    stride: int = 4
    width: int = 32


class SensorEncoder(Encoder):
    Config = SensorConfig

    def __init__(self, cfg, axes, *, device=None, dtype=None):
        super().__init__(cfg, axes, device=device, dtype=dtype)
        n = cfg.channels * cfg.stride
        self.inner = Linear(n, cfg.width, normal(n**-0.5), bias=True, device=device, dtype=dtype)

    @classmethod
    def feature_width(cls, cfg):
        return cfg.width

    @classmethod
    def rows(cls, cfg, meta):
        return -(-meta["dim0"] // cfg.stride)

    @classmethod
    def cost(cls, cfg, meta):
        return 2.0 * cls.rows(cfg, meta) * cfg.channels * cfg.stride * cfg.width

    @classmethod
    def input_shape(cls, cfg):
        return (cfg.channels * cfg.stride,)

    @classmethod
    def prepare(cls, cfg, payload, meta):
        series = torch.from_numpy(np.load(io.BytesIO(payload), allow_pickle=False)).float()
        return F.pad(series, (0, 0, 0, -len(series) % cfg.stride)).reshape(-1, cfg.channels * cfg.stride)

    def forward(self, batch):
        return Features(F.gelu(self.inner(batch.values)), batch.lengths)
