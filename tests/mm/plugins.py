"""Encoders for tests, as people outside the packages write them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from encoders.api import Encoder, Features, adopt
from parallel.topology.stage import whole


class Block(nn.Module):
    """A plain module: among its parameters a scalar, a tie and an untrained one; buffers of both kinds."""

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
    width: int = 8
    depth: int = 2


class Wrapper(Encoder):
    """Series [n, 3] in .npy files, a row for each point. Its stages are plain blocks; it has buffers."""

    Config = WrapperConfig
    pipeline = True

    def __init__(
        self, cfg: Any, axes: Any, *, stage: Any = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(cfg, axes, device=device, dtype=dtype)
        self.cfg, self.stage = cfg, stage or whole(cfg.depth)
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.stage.first:
            self.stem = adopt(lambda: nn.Linear(3, cfg.width), key="stem", **kw)
        blocks = {str(i): adopt(lambda: Block(cfg.width), key=f"blocks.{i}", **kw) for i in self.stage.layers}
        self.blocks = nn.ModuleDict(blocks)
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, cfg.width, **kw))
        self.register_buffer("offset", torch.full((cfg.width,), 0.25, **kw), persistent=False)

    @classmethod
    def feature_width(cls, cfg: Any) -> int:
        return cfg.width

    @classmethod
    def layer_count(cls, cfg: Any) -> int:
        return cfg.depth

    @classmethod
    def hidden_width(cls, cfg: Any, layer: int) -> int:
        return cfg.width

    @classmethod
    def rows(cls, cfg: Any, meta: Any) -> int:
        return meta["dim0"]

    @classmethod
    def cost(cls, cfg: Any, meta: Any) -> float:
        return 2.0 * meta["dim0"] * cfg.width * (3 + cfg.depth * cfg.width)

    @classmethod
    def input_shape(cls, cfg: Any) -> tuple[int, ...]:
        return (3,)

    @classmethod
    def prepare(cls, cfg: Any, payload: bytes, meta: Any) -> torch.Tensor:
        return torch.from_numpy(np.load(io.BytesIO(payload), allow_pickle=False))

    def forward(self, batch: Any, hidden: Any = None) -> Any:
        x = hidden
        if hidden is None:
            x = self.stem(batch.values)
            x = x * self.ramp.to(x.dtype) + self.offset.to(x.dtype)
        for block in self.blocks.values():
            x = block(x)
        return Features(x, tuple(m["dim0"] for m in batch.metas)) if self.stage.last else x


class Forgetful(Wrapper):
    """One that does not adopt() all of its modules."""

    def __init__(self, cfg: Any, axes: Any, **kw: Any) -> None:
        super().__init__(cfg, axes, **kw)
        self.extra = nn.Linear(2, 2)


class Unkeyed(Wrapper):
    """One whose later stages draw other values than the whole encoder would."""

    def __init__(self, cfg: Any, axes: Any, **kw: Any) -> None:
        super().__init__(cfg, axes, **kw)
        self.extra = adopt(nn.Linear(2, 2))


class Different(Wrapper):
    """One that every rank makes with other values."""

    def __init__(self, cfg: Any, axes: Any, **kw: Any) -> None:
        super().__init__(cfg, axes, **kw)
        linear = nn.Linear(2, 2)
        linear.weight.data.fill_(np.random.default_rng().random())
        self.extra = adopt(lambda: linear, key="extra", device=kw.get("device"), dtype=kw.get("dtype"))
