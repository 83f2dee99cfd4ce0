"""From encoder features to the language model's width: norm, linear, squared ReLU, linear."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from encoders.layers import enter, leave
from encoders.share import Share
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import constant, declare, local, normal
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes


class Projector(nn.Module):
    """[rows, d_in] to [rows, d_out]; the hidden width is sharded over tp."""

    def __init__(
        self, d_in: int, hidden: int, d_out: int, axes: Axes, **factory: Unpack[FactoryKwargs]
    ) -> None:
        super().__init__()
        self.axes = axes
        declare(self, "norm", (d_in,), constant(1.0), **factory)
        self.up = Linear(d_in, hidden, normal(d_in**-0.5), shard="column", **factory)
        self.down = Linear(hidden, d_out, normal(hidden**-0.5), shard="row", **factory)

    def forward(self, x: Tensor, share: Share) -> Tensor:
        """[share.kept, d_in], the rows that this rank keeps between blocks, to [share.kept, d_out]."""
        weight = local(self.norm)
        x = x.to(weight.dtype)  # encoders may compute in another dtype
        acc = accumulation_dtype(x.dtype)
        x = F.rms_norm(x.to(acc), weight.shape, weight.to(acc), 1e-5).to(x.dtype)
        h = F.relu(self.up(enter(x, self.axes, share))).square()
        return leave(self.down(h), self.axes, share)
