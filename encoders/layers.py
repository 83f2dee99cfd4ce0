"""Small layers that the encoders share. Activations between blocks are whole on every tp rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.param import constant, declare, local


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LayerNorm(nn.Module):
    """Layer norm over the last dim, computed in float32 (float64)."""

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "weight", (width,), constant(1.0), device=device, dtype=dtype)
        declare(self, "bias", (width,), constant(0.0), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        acc = wide(x.dtype)
        weight, bias = local(self.weight).to(acc), local(self.bias).to(acc)
        return F.layer_norm(x.to(acc), weight.shape, weight, bias, self.eps).to(x.dtype)
