"""What the encoders' layers share: a norm, entering and leaving tensor-parallel weights, recomputation.

Between blocks each tp rank keeps all tokens of its cp rank, or with sequence parallelism a part of them. The
parts of the tp ranks may differ in length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoders.share import Share
from parallel.comm.collectives import gather_tokens, reduce_tokens
from parallel.sharding.dtypes import accumulation_dtype
from parallel.sharding.param import constant, declare, local
from parallel.tensor_parallel import layers as tensor
from parallel.topology.axis import Axes


class LayerNorm(nn.Module):
    """Layer norm over the last dim, `width` wide, with a declared weight and bias.

    It computes in float32, or float64 for float64 inputs, and returns the dtype of its input.
    """

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
        acc = accumulation_dtype(x.dtype)
        weight, bias = local(self.weight).to(acc), local(self.bias).to(acc)
        return F.layer_norm(x.to(acc), weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm over the last dim, `width` wide, with a declared weight; computed as LayerNorm is.

    single: whether a float64 input is normalised in float32 too, as some published code does.
    """

    def __init__(
        self,
        width: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        eps: float = 1e-6,
        single: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.single = eps, single
        declare(self, "weight", (width,), constant(1.0), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        acc = accumulation_dtype(x.dtype)
        if self.single and acc != torch.float32:
            y = x.to(torch.float32)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
            return local(self.weight) * y.to(x.dtype)
        weight = local(self.weight).to(acc)
        return F.rms_norm(x.to(acc), weight.shape, weight, self.eps).to(x.dtype)


def enter(x: Tensor, axes: Axes, share: Share) -> Tensor:
    """Tokens as kept between blocks [share.kept, ..] to all tokens of this cp rank [share.tokens, ..]: put it
    before column-parallel weights. A collective over tp."""
    if share.tokens == 0:
        return x  # no collective is needed; all tp ranks come here
    if not axes.sequence_parallel:
        return tensor.enter(x, axes)
    sizes = [b - a for a, b in share.parts]
    width = max(sizes)
    if share.kept < width:
        x = torch.cat([x, x.new_zeros((width - share.kept, *x.shape[1:]))])
    y = gather_tokens(x, axes.tp)
    if min(sizes) == width:
        return y
    return torch.cat([y[t * width : t * width + n] for t, n in enumerate(sizes)])


def leave(x: Tensor, axes: Axes, share: Share) -> Tensor:
    """Partial sums [share.tokens, ..], which row-parallel weights give, to the tokens that are kept between
    blocks [share.kept, ..]. A collective over tp."""
    if share.tokens == 0:
        return x
    if not axes.sequence_parallel:
        return tensor.leave(x, axes)
    sizes = [b - a for a, b in share.parts]
    width = max(sizes)
    if min(sizes) < width:
        gaps = [x.new_zeros((width - n, *x.shape[1:])) for n in sizes]
        x = torch.cat([y for pair in zip(torch.split(x, sizes), gaps, strict=True) for y in pair])
    return reduce_tokens(x, axes.tp)[: share.kept]


def run_layer(layer: nn.Module, recompute: bool, *args: Any) -> Tensor:
    """layer(*args). With `recompute` only the arguments are kept; the layer runs again in the backward."""
    y: Tensor
    if recompute and torch.is_grad_enabled():
        y = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        y = layer(*args)
    return y
