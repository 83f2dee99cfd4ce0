"""Root-mean-square norms, computed in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import LLMConfig
from parallel.comm.collectives import sum_parts
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.param import Init, ParamSpec, constant, declare, local
from parallel.topology.axis import Axes, Axis


def norm_start(cfg: LLMConfig) -> Init:
    """Initial weights of norms: those with which a norm changes no scale."""
    return constant(0.0 if cfg.norm_shift else 1.0)


def rms_norm(x: Tensor, weight: Tensor, cfg: LLMConfig) -> Tensor:
    """x / rms(x) * weight (or 1 + weight, with norm_shift) over the last dim; weight: of that dim."""
    acc = accumulation_dtype(x.dtype)
    factor = 1.0 + weight.to(acc) if cfg.norm_shift else weight.to(acc)
    return F.rms_norm(x.to(acc), weight.shape, factor, cfg.norm_eps).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm() of hidden states [.., d] (arXiv 1910.07467)."""

    def __init__(self, cfg: LLMConfig, axes: Axes, **factory: Unpack[FactoryKwargs]) -> None:
        super().__init__()
        self.cfg = cfg
        # Under sequence parallelism each tp rank norms other tokens.
        spec = ParamSpec(norm_start(cfg), partial=axes.sequence_parallel)
        declare(self, "weight", (cfg.d_model,), spec, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, local(self.weight), self.cfg)


def norms_of_all_heads(
    parts: list[tuple[Tensor, Tensor, int]], heads: list[int], cfg: LLMConfig, tp: Axis
) -> list[Tensor]:
    """RMS norms over all features of all heads, of which this tp rank has some.

    parts: (x [T, h, D], weight [h * D], copies) of each norm; the first `copies` of the h heads are another
        rank's too, which counts them.
    heads: how many heads each norm has on all ranks.
    All sums of squares are one message.
    """
    acc = accumulation_dtype(parts[0][0].dtype)
    wide = [x.to(acc) for x, _, _ in parts]
    squares = [x[:, copies:].square().sum((1, 2)) for x, (_, _, copies) in zip(wide, parts, strict=True)]
    summed = sum_parts(torch.stack(squares), tp)  # [norms, T]
    out = []
    for x, (given, weight, _), square, n in zip(wide, parts, summed, heads, strict=True):
        factor = weight.to(acc).view(x.shape[1:])
        mean = (square / (n * x.shape[-1]) + cfg.norm_eps).rsqrt()[:, None, None]
        out.append((x * mean * (1.0 + factor if cfg.norm_shift else factor)).to(given.dtype))
    return out
