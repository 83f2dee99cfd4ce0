"""Tensor-parallel linear layers and the vocabulary-parallel embedding.

Megatron-LM's pair (Shoeybi et al., arXiv 1909.08053, section 3): a column-parallel layer shards the output
features and a row-parallel layer the input features, so a block needs one collective on entry and one on
exit. With sequence parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2) they become an all-gather
and a reduce-scatter of tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.comm.collectives import copy_in, gather_tokens, reduce_out, reduce_tokens
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.low_rank import adapted
from parallel.sharding.param import Init, ParamSpec, constant, declare, local
from parallel.topology.axis import Axes, Axis


def enter(x: Tensor, axes: Axes) -> Tensor:
    """Tokens as kept between blocks, to all tokens [T, ..] for column-parallel weights.

    Between blocks a rank keeps its [T / tp, ..] with sequence parallelism, else all tokens.
    """
    return gather_tokens(x, axes.tp) if axes.sequence_parallel else copy_in(x, axes.tp)


def leave(x: Tensor, axes: Axes) -> Tensor:
    """Partial sums [T, ..] of row-parallel weights to their sum over tp, of tokens kept between blocks."""
    return reduce_tokens(x, axes.tp) if axes.sequence_parallel else reduce_out(x, axes.tp)


class Linear(nn.Module):
    """y = x W^T + b with W [d_out, d_in] and b [d_out]; x [.., d_in], y [.., d_out].

    The layer does not communicate: surround it with enter() and leave().

    shard: what tp shards: "column" d_out, "row" d_in, None nothing.
    bias: not with "row", where every rank would add it.
    partial: True where tp ranks pass different tokens; the gradients are then summed over tp.
    """

    adapts = ("weight",)

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
        return F.linear(x, adapted(self, "weight"), bias)


def held_rows(ids: Tensor, rows: int, tp: Axis) -> tuple[Tensor, Tensor]:
    """(row, held), both [T]: local row of each id in a vocabulary sharded over tp, and whether it is here.

    rows: rows of the vocabulary on each rank. Where held is False the row is 0; negative ids are on no rank.
    """
    own = ids - tp.rank * rows
    held = (own >= 0) & (own < rows)
    return own * held, held


class VocabEmbedding(nn.Module):
    """Embedding table [V, d], sharded over tp by vocabulary. ids [T] give partial sums [T, d] for leave().

    Raises ValueError where tp does not divide the vocabulary.
    """

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
        spec = ParamSpec(init, shard_dim=0, matrix=False)
        declare(self, "weight", (vocab, width), spec, device=device, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        weight = local(self.weight)
        if self.tp.size == 1:
            return F.embedding(ids, weight)
        row, held = held_rows(ids, weight.shape[0], self.tp)
        return F.embedding(row, weight) * held.unsqueeze(-1)
