"""From encoder features to the language model's width, as published projectors do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from encoders.activations import ACTIVATIONS, Activation
from encoders.layers import enter, leave
from encoders.resampler import Resampler, Resampling, Sizes
from encoders.share import Share
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import constant, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes

EPS = 1e-5
USUAL = Sizes()  # of a resampler


@dataclass(frozen=True)
class ProjectorKind:
    """What a projector computes.

    kind: mlp: two linear maps around an activation. linear: one. none: features stay as they are, as wide as
        the language model. resampler: a fixed number of rows (encoders.resampler).
    activation: of mlp and resampler.
    bias: whether the linear maps have one.
    norm: of the features first: rms, layer or none; the layers of a resampler have norms of their own.
    sizes: of a resampler, which makes sizes.queries rows of each item that has any.
    """

    kind: Literal["mlp", "linear", "none", "resampler"] = "mlp"
    activation: Activation = "relu2"
    bias: bool = False
    norm: Literal["rms", "layer", "none"] = "rms"
    sizes: Sizes = USUAL

    def rows(self, given: int) -> int:
        """Rows of an item, from those of its features."""
        return self.sizes.queries if self.kind == "resampler" and given else given

    def flops(self, d_in: int, hidden: int, d_out: int) -> float:
        """FLOPs of the forward of one row; of a resampler none, whose cost is by item (resampled)."""
        if self.kind in ("none", "resampler"):
            return 0.0
        return 2.0 * (d_in * d_out if self.kind == "linear" else hidden * (d_in + d_out))

    def resampled(self, given: int, d_in: int, hidden: int, d_out: int) -> tuple[int, float]:
        """Rows of an item and the FLOPs of its resampler, from the rows of its features."""
        s, rows = self.sizes, self.rows(given)
        wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
        linear = 4 * d_out * (rows * wide + (given + rows) * narrow) + 24 * rows * d_out * d_out
        layer = linear + 4 * rows * (given + rows) * wide
        return rows, float(2 * given * hidden * (2 * d_in + d_out) + s.depth * layer)


MLP = ProjectorKind()


class Projector(nn.Module):
    """[rows, d_in] to [rows, d_out], or to the rows of a resampler; the hidden width is sharded over tp."""

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
        elif what.kind == "resampler":
            self.resampler = Resampler(widths, what.sizes, what.activation, axes, **factory)
        elif what.kind == "mlp":
            self.up = Linear(d_in, hidden, normal(d_in**-0.5), shard="column", bias=what.bias, **factory)
            self.down = Linear(hidden, d_out, normal(hidden**-0.5), shard="row", **factory)
            if what.bias:
                declare(self, "bias", (d_out,), constant(0.0), **factory)

    def forward(self, x: Tensor, share: Share, ways: Resampling | None = None) -> Tensor:
        """[share.kept, d_in], the rows that this rank keeps between blocks, to [share.kept, d_out].

        ways: of a resampler, which gives [ways.made.kept, d_out].
        """
        what = self.what
        if what.kind == "none":
            return x
        # Encoders may compute in another dtype.
        x = x.to(local(self._first()).dtype)
        x = self._normed(x)
        if what.kind == "resampler":
            assert ways is not None
            made: Tensor = self.resampler(x, ways)
            return made
        if what.kind == "linear":
            y: Tensor = self.linear(x)
            return y
        h = self.act(self.up(enter(x, self.axes, share)))
        y = leave(self.down(h), self.axes, share)
        return y + local(self.bias) if what.bias else y

    def _first(self) -> Tensor:
        """The first of its weights."""
        part: Any = self.resampler.project.up if self.what.kind == "resampler" else None
        part = part or (self.linear if self.what.kind == "linear" else self.up)
        first: Tensor = part.weight
        return first

    def _normed(self, x: Tensor) -> Tensor:
        if self.what.norm == "none":
            return x
        weight, acc = local(self.norm), accumulation_dtype(x.dtype)
        if self.what.norm == "rms":
            return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), EPS).to(x.dtype)
        bias = local(self.norm_bias).to(acc)
        return F.layer_norm(x.to(acc), weight.shape, weight.to(acc), bias, EPS).to(x.dtype)
