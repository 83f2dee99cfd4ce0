"""Root-mean-square norms, computed in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import ParamSpec, constant, declare, local


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim (arXiv 1910.07467). partial: each tp rank has some tokens."""

    def __init__(self, width: int, eps: float, *, partial: bool, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.eps = eps
        declare(self, "weight", (width,), ParamSpec(constant(1.0), partial=partial), **factory)

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        weight = local(self.weight)
        return F.rms_norm(x.to(acc), weight.shape, weight.to(acc), self.eps).to(x.dtype)
