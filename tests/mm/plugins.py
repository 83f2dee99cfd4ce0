"""Encoders for tests, as people outside the packages write them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from encoders.api import Axes, Encoder, FactoryKwargs, Features, ItemBatch, Meta, Stage, adopt, whole


class Block(nn.Module):
    """A plain module with a scalar, a tied and an untrained parameter, and buffers of both kinds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.twin = nn.Linear(width, width, bias=False)
        self.twin.weight = self.inner.weight
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.rand(width), requires_grad=False)
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.register_buffer("order", torch.randperm(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.inner(x * self.scale.to(x.dtype)) + self.shift)
        return x + self.gate * self.twin(y)[:, self.order]


@dataclass(frozen=True)
class WrapperConfig:
    """width: of hidden states and features; depth: blocks."""

    width: int = 8
    depth: int = 2


class Wrapper(Encoder):
    """Series [n, 3] in .npy files, a row for each point. It has stages of plain blocks, and buffers that it
    makes on the constructor's device."""

    Config = WrapperConfig
    pipeline = True

    def __init__(
        self, cfg: WrapperConfig, axes: Axes, *, stage: Stage | None = None, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__(cfg, axes, **factory)
        self.cfg, self.stage = cfg, stage or whole(cfg.depth)
        if self.stage.first:
            self.stem = adopt(lambda: nn.Linear(3, cfg.width), key="stem", **factory)
        self.blocks = nn.ModuleDict()
        for i in self.stage.layers:
            self.blocks[str(i)] = adopt(lambda: Block(cfg.width), key=f"blocks.{i}", **factory)
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, cfg.width, **factory))
        self.register_buffer("offset", torch.full((cfg.width,), 0.25, **factory), persistent=False)

    @classmethod
    def feature_width(cls, cfg: WrapperConfig) -> int:
        return cfg.width

    @classmethod
    def layer_count(cls, cfg: WrapperConfig) -> int:
        return cfg.depth

    @classmethod
    def hidden_width(cls, cfg: WrapperConfig, layer: int) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: WrapperConfig, meta: Meta) -> int:
        return meta["dim0"]

    @classmethod
    def cost(cls, cfg: WrapperConfig, meta: Meta) -> float:
        return 2.0 * meta["dim0"] * cfg.width * (3 + cfg.depth * cfg.width)

    @classmethod
    def input_shape(cls, cfg: WrapperConfig) -> tuple[int, ...]:
        return (3,)

    @classmethod
    def prepare(cls, cfg: WrapperConfig, payload: bytes, meta: Meta) -> torch.Tensor:
        return torch.from_numpy(np.load(io.BytesIO(payload), allow_pickle=False))

    def forward(self, batch: ItemBatch, hidden: torch.Tensor | None = None) -> Features | torch.Tensor:
        x = hidden
        if x is None:
            x = self.stem(batch.values)
            x = x * self.ramp.to(x.dtype) + self.offset.to(x.dtype)
        for block in self.blocks.values():
            x = block(x)
        return Features(x, tuple(m["dim0"] for m in batch.metas)) if self.stage.last else x


class Forgetful(Wrapper):
    """It does not adopt one of its modules."""

    def __init__(self, cfg: WrapperConfig, axes: Axes, **options: Any) -> None:
        super().__init__(cfg, axes, **options)
        self.extra = nn.Linear(2, 2)


class Unkeyed(Wrapper):
    """It adopts a module without a key: its later stages draw other values than the whole encoder does."""

    def __init__(self, cfg: WrapperConfig, axes: Axes, **options: Any) -> None:
        super().__init__(cfg, axes, **options)
        self.extra = adopt(nn.Linear(2, 2))


class Different(Wrapper):
    """It has different values on each rank."""

    def __init__(self, cfg: WrapperConfig, axes: Axes, **options: Any) -> None:
        super().__init__(cfg, axes, **options)
        linear = nn.Linear(2, 2)
        linear.weight.data.fill_(np.random.default_rng().random())
        self.extra = adopt(
            lambda: linear, key="extra", device=options.get("device"), dtype=options.get("dtype")
        )
