"""Tensor-parallel linear layers and the vocabulary-parallel embedding.

Megatron's pair (arXiv 1909.08053): a column-parallel layer cuts the output features, a row-parallel one the
input features, so that a block needs one collective going in and one coming out. With sequence
parallelism (arXiv 2205.05198) these are an all-gather and a reduce-scatter of tokens instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.comm.collectives import copy_in, gather_tokens, reduce_out, reduce_tokens
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import Init, ParamSpec, constant, declare, local
from parallel.topology.axis import Axes, Axis


def enter(x: Tensor, axes: Axes) -> Tensor:
    """Tokens as kept between blocks to all tokens [T, ..], ready for column-parallel weights."""
    return gather_tokens(x, axes.tp) if axes.sequence_parallel else copy_in(x, axes.tp)


def leave(x: Tensor, axes: Axes) -> Tensor:
    """Partial sums [T, ..] of row-parallel weights to tokens as kept between blocks."""
    return reduce_tokens(x, axes.tp) if axes.sequence_parallel else reduce_out(x, axes.tp)


class Linear(nn.Module):
    """y = x W^T + b with W [d_out, d_in]; `shard` cuts it over tp: "column" d_out, "row" d_in, None nothing.

    The layer does no communication of its own: surround it with enter() and leave(). A row-parallel bias
    would be added once per rank, so only column and unsharded layers have one.
    partial: the layer sees different tokens on each tp rank (its gradients are summed over tp).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        init: Init,
        *,
        shard: str | None = None,
        bias: bool = False,
        partial: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert shard in ("column", "row", None) and not (bias and shard == "row")
        dim = {"column": 0, "row": 1, None: None}[shard]
        spec, factory = ParamSpec(init, dim, partial=partial), FactoryKwargs(device=device, dtype=dtype)
        declare(self, "weight", (d_out, d_in), spec, **factory)
        if bias:
            declare(self, "bias", (d_out,), replace(spec, init=constant(0.0)), **factory)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local(self.bias)
        return F.linear(x, local(self.weight), bias)


def held_rows(ids: Tensor, rows: int, tp: Axis) -> tuple[Tensor, Tensor]:
    """Where ids [T] are among the `rows` rows that this rank holds of a vocabulary cut over tp, and whether
    they are (bool). The place is 0 for those that are not; negative ids are on no rank."""
    own = ids - tp.rank * rows
    held = (own >= 0) & (own < rows)
    return own * held, held


class VocabEmbedding(nn.Module):
    """Embedding table [V, d] cut over tp by vocabulary. ids [T] give partial sums [T, d]: use leave()."""

    def __init__(
        self,
        vocab: int,
        width: int,
        init: Init,
        tp: Axis,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if vocab % tp.size:
            raise ValueError(f"vocabulary of {vocab} does not divide by tp={tp.size}; pad it to a multiple")
        self.tp = tp
        declare(self, "weight", (vocab, width), ParamSpec(init, shard_dim=0), device=device, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(ids, weight)
        row, held = held_rows(ids, weight.shape[0], self.tp)
        return F.embedding(row, weight) * held.unsqueeze(-1)
