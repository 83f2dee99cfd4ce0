"""A block of a vision transformer, its norms and activations, and the MLP that merges patches."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.activations import ACTIVATIONS
from encoders.context import ItemAttention
from encoders.layers import LayerNorm, RMSNorm, enter, leave
from encoders.share import Share
from encoders.vision.attention import WindowAttention
from encoders.vision.config import VisionConfig
from encoders.vision.position import turn
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.joined import joined_linear
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes


class Around(NamedTuple):
    """What a block is told beside its hidden states.

    attention, windows: within frames, and within windows where the model has them.
    rotary: cosines and sines of this cp rank's tokens; None without.
    share: which tokens the rank has.
    """

    attention: ItemAttention
    windows: WindowAttention | None
    rotary: tuple[Tensor, Tensor] | None
    share: Share


def make_norm(cfg: VisionConfig, width: int, **factory: Unpack[FactoryKwargs]) -> nn.Module:
    """A norm of the family's kind."""
    device, dtype = factory.get("device"), factory.get("dtype")
    if cfg.norm == "layer":
        return LayerNorm(width, eps=cfg.eps, device=device, dtype=dtype)
    return RMSNorm(width, eps=cfg.eps, single=cfg.single, device=device, dtype=dtype)


class Attention(nn.Module):
    """Attention whose heads are sharded over tp; [share.kept, width] to itself."""

    adapts = ("q", "k", "v")

    def __init__(self, cfg: VisionConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes, self.head_dim = cfg.width, axes, cfg.head_dim
        self.single = cfg.single and cfg.single_rotation
        for name in ("q", "k", "v"):
            declare(self, name, (d, d), ParamSpec(normal(d**-0.5), shard_dim=0), **factory)
            if name in cfg.biases:
                declare(self, f"bias_{name}", (d,), ParamSpec(constant(0.0), shard_dim=0), **factory)
        self.biased = [name in cfg.biases for name in ("q", "k", "v")]
        self.out = Linear(d, d, normal(d**-0.5 / (2 * cfg.layers) ** 0.5), shard="row", **factory)
        if "out" in cfg.biases:
            declare(self, "bias", (d,), constant(0.0), **factory)

    def forward(self, x: Tensor, around: Around, windowed: bool) -> Tensor:
        h = enter(x, self.axes, around.share)
        weights = [adapted(self, name) for name in self.adapts]
        biases = None
        if any(self.biased):
            biases = [
                local(getattr(self, f"bias_{n}")) if has else w.new_zeros(len(w))
                for n, has, w in zip("qkv", self.biased, weights, strict=True)
            ]
        q, k, v = torch.unflatten(joined_linear(h, weights, biases), -1, (3, -1, self.head_dim)).unbind(1)
        if around.rotary is not None:
            q, k = (turn(x, *around.rotary, single=self.single) for x in (q, k))
        attention = around.windows if windowed else around.attention
        assert attention is not None
        y = attention(q, torch.stack([k, v], 1)).flatten(1)
        y = leave(self.out(y), self.axes, around.share)
        return y + local(self.bias) if hasattr(self, "bias") else y


class MLP(nn.Module):
    """Two linear maps around an activation, or a gated one; the hidden width is sharded over tp."""

    def __init__(self, cfg: VisionConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes, self.act = cfg.width, axes, ACTIVATIONS[cfg.activation]
        bias = "mlp" in cfg.biases
        self.up = Linear(d, cfg.mlp, normal(d**-0.5), shard="column", bias=bias, **factory)
        self.gate = (
            Linear(d, cfg.mlp, normal(d**-0.5), shard="column", bias=bias, **factory) if cfg.gated else None
        )
        std = cfg.mlp**-0.5 / (2 * cfg.layers) ** 0.5
        self.down = Linear(cfg.mlp, d, normal(std), shard="row", **factory)
        if bias:
            declare(self, "bias", (d,), constant(0.0), **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        h = enter(x, self.axes, share)
        h = self.act(self.up(h)) if self.gate is None else self.act(self.gate(h)) * self.up(h)
        y = leave(self.down(h), self.axes, share)
        return y + local(self.bias) if hasattr(self, "bias") else y


class Block(nn.Module):
    """Attention and MLP, each x + scale * f(norm(x)). windowed: whether its attention stays in windows."""

    def __init__(
        self, cfg: VisionConfig, axes: Axes, windowed: bool, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        self.windowed = windowed
        self.norm1, self.norm2 = (make_norm(cfg, cfg.width, **factory) for _ in range(2))
        self.attention = Attention(cfg, axes, **factory)
        self.mlp = MLP(cfg, axes, **factory)
        self.scaled = cfg.layer_scale
        if cfg.layer_scale:
            declare(self, "scale1", (cfg.width,), constant(1.0), **factory)
            declare(self, "scale2", (cfg.width,), constant(1.0), **factory)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        y = self.attention(self.norm1(x), around, self.windowed)
        x = x + (y * local(self.scale1) if self.scaled else y)
        y = self.mlp(self.norm2(x), around.share)
        z: Tensor = x + (y * local(self.scale2) if self.scaled else y)
        return z


class Merger(nn.Module):
    """Merged patches [rows, merge**2 * width] to [rows, cfg.merged]: norm, linear, GELU, linear.

    whole: whether the norm is over a merged row, not over each of its patches.
    """

    def __init__(self, cfg: VisionConfig, axes: Axes, whole: bool, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        d, self.axes = cfg.merge**2 * cfg.width, axes
        self.width, self.norm_width = d, d if whole else cfg.width
        self.norm = make_norm(cfg, self.norm_width, **factory)
        self.up = Linear(d, d, normal(d**-0.5), shard="column", bias=True, **factory)
        self.down = Linear(d, cfg.merged, normal(d**-0.5), shard="row", **factory)
        declare(self, "bias", (cfg.merged,), constant(0.0), **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """share: of rows, not of patches."""
        h = self.norm(x.reshape(-1, self.norm_width)).reshape(-1, self.width)
        h = F.gelu(self.up(enter(h, self.axes, share)))
        return leave(self.down(h), self.axes, share) + local(self.bias)
