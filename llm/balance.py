"""Keeping experts evenly loaded: choice by groups, and losses of the router's own.

Objectives are sums over tokens here, so that no layout changes them; the caller divides them by the number of
all routed tokens of the step (llm.counts), whatever share of those is supervised. They enter the backward
where they arise (attach), which spares a second output of every layer and pipeline stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_parallel.routing import tally
from parallel.topology.axis import Axis


def choose(score: Tensor, k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """The k best columns of each row [n, k] of score [n, E]; of equal scores the lowest index comes first.

    With groups, only experts of the top_groups groups whose two best scores have the largest sum
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    if top_groups < groups:
        grouped = score.unflatten(1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # [n, groups]
        barred = torch.ones_like(strength, dtype=torch.bool).scatter_(1, _best(strength, top_groups), False)
        score = grouped.masked_fill(barred.unsqueeze(-1), -torch.inf).flatten(1)
    return _best(score, k)


def _best(score: Tensor, k: int) -> Tensor:
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]


def document_loads(
    chosen: Tensor, document: Tensor, documents: int, experts: int, over: list[Axis]
) -> Tensor:
    """How many choices fell on each expert in each document, int64 [documents, experts], over all ranks.

    chosen [n, k] and document [n], int64, of this rank's tokens. A collective over each axis of `over`,
    which together hold the documents' tokens.
    """
    loads = tally(document.unsqueeze(1) * experts + chosen, documents * experts)
    for axis in over:
        if axis.size > 1:
            dist.all_reduce(loads, group=axis.group)
    return loads.view(documents, experts)


def sequence_loss(share: Tensor, loads: Tensor, document: Tensor) -> Tensor:
    """Balance loss of each document times its tokens, summed over this rank's tokens; a scalar.

    share [n, E]: each token's scores as fractions of their sum; loads: document_loads of all ranks;
    document [n]. A document of t tokens, k experts each, has the loss sum_e f_e P_e with
    f_e = E / (k t) loads_e and P_e = 1 / t (sum of share_e over its tokens), 1 where it is even (DeepSeek-V3,
    arXiv 2412.19437, equations 17 to 20; its form is that of Switch, arXiv 2101.03961, equation 4). Divided
    by all routed tokens the result is the mean over documents, weighted by their tokens. loads are whole
    numbers without a gradient, so ranks' parts simply add up.
    """
    loads = loads.to(share.dtype)
    rate = loads * (loads.shape[1] / loads.sum(1, keepdim=True).clamp(min=1))  # sum is k t
    return (share * rate.index_select(0, document)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Sum over tokens of the squared log of the partition sum of logits [n, E]; divided by all routed tokens
    it is the loss of ST-MoE (arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(logits, -1).square().sum()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, objective: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, objective.new_empty(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def attach(x: Tensor, objective: Tensor, scale: float) -> Tensor:
    """x itself, whose backward also adds the gradients of scale * objective (a scalar)."""
    return _Attach.apply(x, objective, scale)
