"""Dense MLP with squared ReLU, without gate or bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.axis import Axes
from parallel.param import normal
from parallel.tensor import Linear, enter, leave


class MLP(nn.Module):
    """down(relu(up(x))^2), up cut by columns and down by rows."""

    def __init__(
        self,
        width: int,
        hidden: int,
        axes: Axes,
        *,
        std: float,
        out_std: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.axes = axes
        self.up = Linear(width, hidden, normal(std), shard="column", device=device, dtype=dtype)
        self.down = Linear(hidden, width, normal(out_std), shard="row", device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return leave(self.down(F.relu(self.up(enter(x, self.axes))).square()), self.axes)
