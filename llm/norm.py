"""Root-mean-square norms, computed in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.sharding.param import constant, declare, local


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, softmax, scan, router and loss compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim. partial: sees a share of the tokens on each tp rank."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        partial: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "weight", (width,), constant(1.0), partial=partial, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        acc = wide(x.dtype)
        weight = local(self.weight)
        return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), self.eps).to(x.dtype)
