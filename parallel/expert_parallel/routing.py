"""Plans which rank and expert each routed row goes to: capacity limits, and the exchange of row counts.

The router decides at run time how many rows go where, so this room exchanges sizes between ranks; every other
room derives them (law 4). Routing is dropless by default, with uneven splits.
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
    """Where the rows of a rank's tokens go. n tokens that choose k experts each have n k rows, token major.

    axis: the expert-parallel axis.
    order: int64 [m], the rows to send, sorted by expert. A number of n k or more stands for a row of zeros
        that pads an expert.
    choices: k.
    sends, receives: rows to and from each rank of the axis; empty where the axis has one rank.
    regroup: the order of received rows that puts each local expert's rows together, and its inverse. None
        where the axis has one rank: its rows are together already.
    per_expert: rows of each local expert.
    dropless: True where `order` holds each of the n k rows once and no padding.
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
    """How often each of 0 .. size - 1 occurs in `index` (int64): int64 [size].

    Unlike torch.bincount() this does not make the host wait for the device.
    """
    flat = index.reshape(-1)
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def capacity_rows(choices: int, n_experts: int, factor: float) -> int:
    """Rows that an expert may take from one rank: `factor` times its even share of them, at least 1.

    choices: rows of the rank, n k. factor: the capacity factor (GShard, arXiv 2006.16668, section 2.2).
    """
    return max(1, math.ceil(factor * choices / n_experts))


def within_capacity(expert: Tensor, score: Tensor, n_experts: int, rows: int) -> Tensor:
    """Which choices remain where an expert takes `rows` rows of this rank, the best scored: bool [n, k].

    expert: int64 [n, k], the chosen experts. score: [n, k], the router's scores.

    A capacity makes results depend on how tokens are split over ranks; without one nothing is dropped.
    """
    flat = expert.reshape(-1)
    best = torch.argsort(score.detach().reshape(-1), descending=True, stable=True)
    best = best[torch.argsort(flat[best], stable=True)]  # by expert, then by score
    keep = torch.empty_like(flat, dtype=torch.bool)
    keep[best] = _rank_in_group(tally(flat, n_experts), flat.numel()) < rows
    return keep.view_as(expert)


def _rank_in_group(counts: Tensor, total: int) -> Tensor:
    """Index of each row within its own group, for consecutive groups of `counts` rows: int64 [total]."""
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=counts.device) - starts


def plan_route(
    expert: Tensor, n_experts: int, axis: Axis, keep: Tensor | None = None, pad: int | None = None
) -> Route:
    """The route of n tokens to their chosen experts; a collective over `axis`, with one host wait.

    expert: int64 [n, k], the chosen experts.
    keep: bool [n, k], False for a dropped choice; None drops none.
    pad: rows that every expert gets from this rank, filled up with zeros. `keep` must leave no expert more.
        None: no padding.
    """
    flat = expert.reshape(-1)
    if keep is not None:
        flat = torch.where(keep.reshape(-1), flat, n_experts)  # dropped rows sort last
    order = torch.argsort(flat, stable=True)
    counts = tally(flat, n_experts + 1)[:n_experts]
    if pad is not None:
        order, counts = _padded(flat, order, pad, n_experts)
    dropless = keep is None and pad is None
    if axis.size == 1:
        per_expert = counts.tolist()
        return Route(
            axis=axis,
            order=order[: sum(per_expert)],
            choices=expert.shape[1],
            sends=[],
            receives=[],
            regroup=None,
            per_expert=per_expert,
            dropless=dropless,
        )
    local = n_experts // axis.size
    arriving = torch.empty_like(counts)  # [source rank, local expert]
    dist.all_to_all_single(arriving, counts, group=axis.group)
    table = torch.stack([counts, arriving]).view(2, axis.size, local)
    leaving, incoming = table.tolist()  # the one host wait
    sends, receives = [sum(rows) for rows in leaving], [sum(rows) for rows in incoming]
    regroup = group_by_expert(arriving, local, sum(receives))
    back = torch.empty_like(regroup)
    back[regroup] = torch.arange(len(regroup), device=back.device)
    return Route(
        axis=axis,
        order=order[: sum(sends)],
        choices=expert.shape[1],
        sends=sends,
        receives=receives,
        regroup=(regroup, back),
        per_expert=columns(incoming),
        dropless=dropless,
    )


def _padded(flat: Tensor, order: Tensor, rows: int, n_experts: int) -> tuple[Tensor, Tensor]:
    """Order and counts with exactly `rows` rows for each expert.

    flat: the expert of each row, n_experts for a dropped one. order: the rows sorted by expert.
    """
    counts = tally(flat, n_experts + 1)
    expert = flat[order]
    # Dropped rows go to one slot after all others, which [:-1] removes.
    slot = expert * rows + _rank_in_group(counts, len(flat))
    slot = torch.where(expert < n_experts, slot, n_experts * rows)
    out = order.new_full((n_experts * rows + 1,), len(flat)).scatter_(0, slot, order)[:-1]
    return out, counts.new_full((n_experts,), rows)


def group_by_expert(counts: Tensor, experts: int, total: int) -> Tensor:
    """The order of all ranks' rows, concatenated by rank, that groups them by expert: int64 [total].

    counts: int64 [ranks * experts], rows of each rank for each expert, rank major; a rank's rows are sorted
        by expert. total: their sum.
    """
    expert = torch.arange(experts, device=counts.device).repeat(len(counts) // experts)
    return torch.argsort(expert.repeat_interleave(counts, output_size=total), stable=True)


def columns(table: list[list[int]]) -> list[int]:
    """The sum of each column of a table."""
    return [sum(column) for column in zip(*table, strict=True)]
