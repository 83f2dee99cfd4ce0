"""Which rank and expert each routed row goes to: capacity limits, and the exchange of row counts.

The router decides how many rows go where, so this is the one place where sizes are exchanged at run time.
Routing is dropless by default, with uneven splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.topology.axis import Axis


@dataclass(frozen=True)
class Route:
    """Where the rows of this rank's tokens go.

    order [m]: rows (token major) sorted by expert, n k of them unless some are dropped, rows n k and on being
    zeros that pad an expert; sends, receives: rows to and from each rank of the ep axis; regroup: order of
    the received rows that puts each local expert's together, and the order that undoes it, None where they
    are together; per_expert: rows of each local expert; dropless: each of the n k rows is in order, once, and
    nothing else.
    """

    axis: Axis
    order: Tensor
    choices: int
    sends: list[int]
    receives: list[int]
    regroup: tuple[Tensor, Tensor] | None
    per_expert: list[int]
    dropless: bool = True


def tally(index: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs in index (int64): [size]. Unlike bincount it does not wait for
    an accelerator."""
    flat = index.reshape(-1)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def capacity_rows(choices: int, n_experts: int, factor: float) -> int:
    """Rows that an expert may take of a rank's n k = `choices`: factor times its even share, at least one."""
    return max(1, math.ceil(factor * choices / n_experts))


def within_capacity(expert: Tensor, score: Tensor, n_experts: int, rows: int) -> Tensor:
    """Which choices [n, k] (bool) remain if an expert takes at most `rows` of this rank, those scored best.

    expert, score [n, k]. It makes results depend on how tokens are cut over ranks: nothing is dropped
    without it (GShard, arXiv 2006.16668, section 3.2).
    """
    flat = expert.reshape(-1)
    best = torch.argsort(score.detach().reshape(-1), descending=True, stable=True)
    best = best[torch.argsort(flat[best], stable=True)]  # by expert, then by score
    keep = torch.empty_like(flat, dtype=torch.bool)
    keep[best] = _rank_in_group(tally(flat, n_experts), flat.numel()) < rows
    return keep.view_as(expert)


def _rank_in_group(counts: Tensor, total: int) -> Tensor:
    """Place of each row in its own group, groups of these sizes lying one behind another: int64 [total]."""
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=counts.device) - starts


def plan_route(
    expert: Tensor, n_experts: int, axis: Axis, keep: Tensor | None = None, pad: int | None = None
) -> Route:
    """Route from the chosen experts [n, k] (int64) of n tokens; a collective over `axis`, one host wait.

    keep [n, k] (bool): choices that are not dropped, None for all. pad: rows that each expert gets of this
    rank, zeros making up for what lacks; keep must leave no expert more.
    """
    flat = expert.reshape(-1)
    if keep is not None:
        flat = torch.where(keep.reshape(-1), flat, n_experts)  # dropped ones come last
    order = torch.argsort(flat, stable=True)
    counts = tally(flat, n_experts + 1)[:n_experts]
    if pad is not None:
        order, counts = _padded(flat, order, pad, n_experts)
    dropless = keep is None and pad is None
    if axis.size == 1:
        per_expert = counts.tolist()
        kept = order[: sum(per_expert)]
        return Route(axis, kept, expert.shape[1], [], [], None, per_expert, dropless)
    local = n_experts // axis.size
    arriving = torch.empty_like(counts)  # [source rank, local expert]
    dist.all_to_all_single(arriving, counts, group=axis.group)
    table = torch.stack([counts, arriving]).view(2, axis.size, local)
    leaving, incoming = table.tolist()  # the one wait for the device
    sends, receives = [sum(rows) for rows in leaving], [sum(rows) for rows in incoming]
    regroup = group_by_expert(arriving, local, sum(receives))
    back = torch.empty_like(regroup)
    back[regroup] = torch.arange(len(regroup), device=back.device)
    kept = order[: sum(sends)]
    return Route(axis, kept, expert.shape[1], sends, receives, (regroup, back), columns(incoming), dropless)


def _padded(flat: Tensor, order: Tensor, rows: int, n_experts: int) -> tuple[Tensor, Tensor]:
    """Order and counts with exactly `rows` for each expert; flat: the expert of each row or n_experts."""
    counts = tally(flat, n_experts + 1)
    expert = flat[order]
    # Dropped rows and rows that pad share one slot behind the others, which is cut off.
    slot = expert * rows + _rank_in_group(counts, len(flat))
    slot = torch.where(expert < n_experts, slot, n_experts * rows)
    out = order.new_full((n_experts * rows + 1,), len(flat)).scatter_(0, slot, order)[:-1]
    return out, counts.new_full((n_experts,), rows)


def group_by_expert(counts: Tensor, experts: int, total: int) -> Tensor:
    """The order of all ranks' rows, end to end, that puts each expert's together: int64 [total].

    counts [ranks * experts]: the rows of each rank for each expert, in this order already; total: their sum.
    """
    expert = torch.arange(experts, device=counts.device).repeat(len(counts) // experts)
    return torch.argsort(expert.repeat_interleave(counts, output_size=total), stable=True)


def columns(table: list[list[int]]) -> list[int]:
    """The sum of each column."""
    return [sum(column) for column in zip(*table, strict=True)]
