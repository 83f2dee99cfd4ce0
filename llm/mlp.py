"""Dense MLP: up (and gate), an activation, down; and the activations themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import CLAMP, STEEP, Activation, LLMConfig
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, constant, declare, local, normal
from parallel.tensor_parallel.layers import Linear, enter, leave
from parallel.topology.axis import Axes


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, which keeps only its output for the backward, as the product after it does anyway.

    The gradient 2 relu(x) is twice the root of the output; it loses no more than that root's rounding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return _root(y).mul_(2).mul_(grad)


_squared_relu: Callable[[Tensor], Tensor] = _SquaredReLU.apply


def _root(y: Tensor) -> Tensor:
    """y.sqrt(), but zero below the smallest normal number.

    On CPUs torch takes the root of an exact zero eight times as slowly as others; half of all squared ReLUs
    are zero.
    """
    if y.device.type != "cpu":
        return y.sqrt()
    tiny = torch.finfo(y.dtype).tiny
    return F.threshold(y.clamp_min(tiny).sqrt_(), math.sqrt(tiny), 0.0, inplace=True)


def activate(kind: Activation, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """act(up), or with a gate act(gate) * up (GLU variants, arXiv 2002.05202). relu2 is the squared ReLU
    (arXiv 2109.08668), gelu the exact one."""
    if kind == "clamped":
        assert gate is not None
        g = gate.clamp(max=CLAMP)
        return g * torch.sigmoid(STEEP * g) * (up.clamp(-CLAMP, CLAMP) + 1.0)
    x = up if gate is None else gate
    if kind == "relu2":
        y = _squared_relu(x)
    elif kind == "gelu":
        y = F.gelu(x)
    elif kind == "gelu_tanh":
        y = F.gelu(x, approximate="tanh")
    else:
        y = F.silu(x)
    return y if gate is None else y * up


@dataclass(frozen=True)
class MLPShape:
    """What a dense MLP is, whatever it is sharded over."""

    width: int
    """Features in and out."""
    hidden: int
    """Features between up and down."""
    std: float
    """Standard deviation of the initial weights of up and gate."""
    out_std: float
    """The same of down."""
    activation: Activation = "relu2"
    gated: bool = False
    """act(gate x) * (up x) in the place of act(up x)."""
    bias: bool = False
    """Whether up, gate and down have biases."""


class MLP(nn.Module):
    """down(act(up x)); over tp, up and gate are sharded by columns and down by rows."""

    def __init__(self, shape: MLPShape, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.axes, self.activation = axes, shape.activation
        width, hidden, bias = shape.width, shape.hidden, shape.bias
        self.up = Linear(width, hidden, normal(shape.std), shard="column", bias=bias, **factory)
        self.gate: Linear | None = None
        if shape.gated:
            self.gate = Linear(width, hidden, normal(shape.std), shard="column", bias=bias, **factory)
        self.down = Linear(hidden, width, normal(shape.out_std), shard="row", **factory)
        if bias:
            # Added after the partial sums are, so that it counts once.
            after = ParamSpec(constant(0.0), partial=axes.sequence_parallel)
            declare(self, "bias", (width,), after, **factory)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, width] or this rank's share of it, to the same."""
        x = enter(x, self.axes)
        gate = None if self.gate is None else self.gate(x)
        y = leave(self.down(activate(self.activation, self.up(x), gate)), self.axes)
        return y if self.bias is None else y + local(self.bias)


def config_mlp(cfg: LLMConfig, ffn: int, axes: Axes, **factory: Unpack[FactoryKwargs]) -> MLP:
    """The MLP of width `ffn` that a model's config describes: a dense layer, or a shared expert."""
    shape = MLPShape(
        cfg.d_model, ffn, cfg.init_std, cfg.out_std, cfg.activation, gated=cfg.mlp_gated, bias=cfg.mlp_bias
    )
    return MLP(shape, axes, **factory)
