"""Load balance of experts: choice by groups, and the router's own losses.

Losses here are sums over tokens, so that no layout changes them. The caller divides them by the number of all
routed tokens of the step (llm.counts), supervised or not. attach() adds them to the backward where they are
computed, so layers and pipeline stages need no second output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_parallel.routing import tally
from parallel.topology.axis import Axis


def choose(score: Tensor, k: int, groups: int = 1, top_groups: int = 1) -> Tensor:
    """Columns of the k largest values in each row of score [n, E]: [n, k]; ties go to the lowest index.

    With groups, only experts of the top_groups best groups count; a group is rated by the sum of its two
    largest scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    if top_groups < groups:
        grouped = torch.unflatten(score, 1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # [n, groups]
        barred = torch.ones_like(strength, dtype=torch.bool).scatter_(1, _best(strength, top_groups), False)
        score = grouped.masked_fill(barred.unsqueeze(-1), -torch.inf).flatten(1)
    return _best(score, k)


def _best(score: Tensor, k: int) -> Tensor:
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]


def document_loads(
    chosen: Tensor, document: Tensor, documents: int, experts: int, over: list[Axis]
) -> Tensor:
    """Tokens of each document that chose each expert, int64 [documents, experts], over all ranks.

    chosen [n, k] and document [n], int64: of this rank's tokens. Calls a collective over each axis of `over`;
    the ranks of these axes together hold the documents' tokens.
    """
    loads = tally(document.unsqueeze(1) * experts + chosen, documents * experts)
    for axis in over:
        if axis.size > 1:
            dist.all_reduce(loads, group=axis.group)
    return loads.view(documents, experts)


def sequence_loss(share: Tensor, loads: Tensor, document: Tensor) -> Tensor:
    """Balance loss of each document times its number of tokens, summed over this rank's tokens; a scalar.

    share [n, E]: each token's scores as fractions of their sum. loads: document_loads() over all ranks.
    document [n]: each token's document. A document of t tokens with k experts each has the loss
    sum_e f_e P_e with f_e = E / (k t) loads_e and P_e = 1 / t (sum of share_e over its tokens); an even load
    gives 1 (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20; the form of Switch, arXiv 2101.03961,
    equation 4). The result over all routed tokens is the mean over documents, weighted by their tokens.
    loads are whole numbers without a gradient, so the parts of all ranks add up.
    """
    loads = loads.to(share.dtype)
    rate = loads * (loads.shape[1] / loads.sum(1, keepdim=True).clamp(min=1))  # sum is k t
    return (share * rate.index_select(0, document)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Sum over tokens of the squared logsumexp of logits [n, E]; a scalar.

    Divided by the number of all routed tokens it is the z-loss of ST-MoE (arXiv 2202.08906, equation 5).
    """
    return torch.logsumexp(logits, -1).square().sum()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, objective: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, objective.new_empty(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


_attach: Callable[[Tensor, Tensor, float], Tensor] = _Attach.apply


def attach(x: Tensor, objective: Tensor, scale: float) -> Tensor:
    """x itself; its backward adds the gradients of scale * objective, a scalar."""
    return _attach(x, objective, scale)
