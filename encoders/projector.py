"""From encoder features to the language model's width, as published projectors do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from encoders.activations import ACTIVATIONS, Activation
from encoders.layers import enter, leave
from encoders.share import Share
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import constant, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes

EPS = 1e-5


@dataclass(frozen=True)
class ProjectorKind:
    """What a projector computes.

    kind: mlp: two linear maps around an activation. linear: one. none: features stay as they are, as wide as
        the language model.
    activation: of mlp.
    bias: whether the linear maps have one.
    norm: of the features first: rms, layer or none.
    """

    kind: Literal["mlp", "linear", "none"] = "mlp"
    activation: Activation = "relu2"
    bias: bool = False
    norm: Literal["rms", "layer", "none"] = "rms"

    def flops(self, d_in: int, hidden: int, d_out: int) -> float:
        """FLOPs of the forward of one row."""
        if self.kind == "none":
            return 0.0
        return 2.0 * (d_in * d_out if self.kind == "linear" else hidden * (d_in + d_out))


MLP = ProjectorKind()


class Projector(nn.Module):
    """[rows, d_in] to [rows, d_out]; the hidden width of mlp is sharded over tp."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        axes: Axes,
        what: ProjectorKind = MLP,
        **factory: Unpack[FactoryKwargs],
    ) -> None:
        """widths: (d_in, hidden, d_out). Raises ValueError where kind is none and the widths differ."""
        super().__init__()
        self.axes, self.what, self.act = axes, what, ACTIVATIONS[what.activation]
        d_in, hidden, d_out = widths
        if what.kind == "none" and d_in != d_out:
            raise ValueError(
                f"projector.kind=none, but features are {d_in} wide and the language model {d_out}; needed: "
                "kind=linear or mlp"
            )
        if what.norm != "none" and what.kind != "none":
            declare(self, "norm", (d_in,), constant(1.0), **factory)
            if what.norm == "layer":
                declare(self, "norm_bias", (d_in,), constant(0.0), **factory)
        if what.kind == "linear":
            self.linear = Linear(d_in, d_out, normal(d_in**-0.5), bias=what.bias, **factory)
        elif what.kind == "mlp":
            self.up = Linear(d_in, hidden, normal(d_in**-0.5), shard="column", bias=what.bias, **factory)
            self.down = Linear(hidden, d_out, normal(hidden**-0.5), shard="row", **factory)
            if what.bias:
                declare(self, "bias", (d_out,), constant(0.0), **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """[share.kept, d_in], the rows that this rank keeps between blocks, to [share.kept, d_out]."""
        what = self.what
        if what.kind == "none":
            return x
        # Encoders may compute in another dtype.
        x = x.to(local(self.linear.weight if what.kind == "linear" else self.up.weight).dtype)
        x = self._normed(x)
        if what.kind == "linear":
            y: Tensor = self.linear(x)
            return y
        h = self.act(self.up(enter(x, self.axes, share)))
        y = leave(self.down(h), self.axes, share)
        return y + local(self.bias) if what.bias else y

    def _normed(self, x: Tensor) -> Tensor:
        if self.what.norm == "none":
            return x
        weight, acc = local(self.norm), accumulation_dtype(x.dtype)
        if self.what.norm == "rms":
            return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), EPS).to(x.dtype)
        bias = local(self.norm_bias).to(acc)
        return F.layer_norm(x.to(acc), weight.shape, weight.to(acc), bias, EPS).to(x.dtype)
