"""Plans which rank and expert each routed row goes to: capacity limits, and the exchange of row counts.

The router decides at run time how many rows go where, so this room exchanges sizes between ranks; every other
room derives them (law 4). Routing is dropless by default, with uneven splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_parallel.grouped import ExpertRows
from parallel.sequence.host import to_device
from parallel.topology.axis import Axis

Table = Sequence[Sequence[int]]
"""A number of each rank that shares experts with this one: by rank of etp, then by rank of ep."""


@dataclass(frozen=True, eq=False)
class EtpRows:
    """The rows that etp ranks bring to the experts whose features are sharded over them.

    axis: the etp axis.
    rows: rows of each rank.
    regroup: int64 [sum(rows)], the order of all ranks' rows, concatenated by rank, that puts each expert's
        rows together.
    experts: rows of each expert, from all ranks.
    """

    axis: Axis
    rows: list[int]
    regroup: Tensor
    experts: ExpertRows


@dataclass(frozen=True, eq=False)
class Route:
    """Where the rows of a rank's tokens go. n tokens that choose k experts each have n k rows, token major.

    axis: the expert-parallel axis.
    order: int64 [m], the rows to send, sorted by expert. A number of n k or more stands for a row of zeros
        that pads an expert.
    choices: k.
    sends, receives: rows to and from each rank of the axis; empty where the axis has one rank.
    regroup: the order of received rows that puts each local expert's rows together, and its inverse. None
        where the axis has one rank: its rows are together already.
    experts: rows of each local expert.
    etp: the rows that meet in this rank's slices of its experts; None where etp has one rank.
    dropless: True where `order` holds each of the n k rows once and no padding.
    """

    axis: Axis
    order: Tensor
    choices: int
    sends: list[int]
    receives: list[int]
    regroup: tuple[Tensor, Tensor] | None
    experts: ExpertRows
    etp: EtpRows | None = None
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
    expert: Tensor,
    n_experts: int,
    axis: Axis,
    *,
    etp: Axis | None = None,
    keep: Tensor | None = None,
    pad: Table | None = None,
) -> Route:
    """The route of n tokens to their chosen experts; collectives over `axis` and etp, with one host wait.

    The host reads how many rows go to and come from each rank, all in one message of the device. It waits for
    nothing where it knows them: with `pad`, and where no row leaves the rank or is dropped.

    expert: int64 [n, k], the chosen experts.
    etp: the axis over which experts' features are sharded; None for one rank.
    keep: bool [n, k], False for a dropped choice; None drops none.
    pad: rows that every expert gets from each rank, filled up with zeros. `keep` must leave no expert more.
        None: no padding.
    """
    etp = etp or Axis.single("etp")
    flat = expert.reshape(-1)
    if keep is not None:
        flat = torch.where(keep.reshape(-1), flat, n_experts)  # dropped rows sort last
    order = torch.argsort(flat, stable=True)
    if pad is not None:
        order = _padded(flat, order, pad[etp.rank][axis.rank], n_experts)
        counts, sizes = _padded_counts(pad, n_experts // axis.size, axis, etp, expert.device)
    else:
        counts = _exchanged(tally(flat, n_experts + 1)[:n_experts], axis, etp)
        known = keep is None and axis.size == etp.size == 1
        sizes = _Sizes(*[[flat.numel()]] * 3) if known else _read(counts)
    experts = ExpertRows(counts.arriving.sum(0), sum(sizes.receives))
    return Route(
        axis=axis,
        order=order[: sum(sizes.sends)],
        choices=expert.shape[1],
        sends=sizes.sends,
        receives=sizes.receives,
        regroup=_there_and_back(counts.arriving, experts.total) if axis.size > 1 else None,
        experts=experts,
        etp=etp_rows(counts.meeting, sizes.meeting, etp) if etp.size > 1 else None,
        dropless=keep is None and pad is None,
    )


class _Counts(NamedTuple):
    """Rows by expert, int64, on the device."""

    leaving: Tensor
    """[ranks of ep, local experts]: this rank's rows for the experts of each rank."""
    arriving: Tensor
    """[ranks of ep, local experts]: each rank's rows for this rank's experts."""
    meeting: Tensor
    """[ranks of etp, local experts]: rows that each etp rank has for the experts that they share."""


class _Sizes(NamedTuple):
    """The sum of each row of _Counts, on the host."""

    sends: list[int]
    receives: list[int]
    meeting: list[int]


def _exchanged(counts: Tensor, ep: Axis, etp: Axis) -> _Counts:
    """What all ranks choose. counts: int64 [n_experts], this rank's rows for each expert."""
    leaving = arriving = counts.view(ep.size, -1)
    if ep.size > 1:
        # No turn is given away here: the host reads the counts at once, and a forward would take three turns
        # a layer where a backward takes two.
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=ep.group)
    meeting = mine = arriving.sum(0, keepdim=True)
    if etp.size > 1:
        meeting = mine.new_empty((etp.size, mine.shape[1]))
        dist.all_gather_into_tensor(meeting, mine, group=etp.group)
    return _Counts(leaving, arriving, meeting)


def _read(counts: _Counts) -> _Sizes:
    sums = [rows.sum(1) for rows in counts]
    numbers = iter(torch.cat(sums).tolist())  # a layer's one host wait
    return _Sizes(*([next(numbers) for _ in rows] for rows in sums))


def _padded_counts(
    pad: Table, local: int, ep: Axis, etp: Axis, device: torch.device
) -> tuple[_Counts, _Sizes]:
    """Counts and sizes where all experts get pad[e][r] rows of rank r of ep and rank e of etp."""
    table = to_device(np.asarray(pad, dtype=np.int64), device)  # [etp, ep]
    rows = table[etp.rank].unsqueeze(1)
    counts = _Counts(
        leaving=rows[ep.rank].expand(ep.size, local),
        arriving=rows.expand(ep.size, local),
        meeting=table.sum(1, keepdim=True).expand(etp.size, local),
    )
    mine = pad[etp.rank]
    return counts, _Sizes(
        sends=[local * mine[ep.rank]] * ep.size,
        receives=[local * n for n in mine],
        meeting=[local * sum(row) for row in pad],
    )


def _there_and_back(arriving: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order of received rows that groups them by expert, and its inverse."""
    there = group_by_expert(arriving, total)
    back = torch.empty_like(there)
    back[there] = torch.arange(total, device=back.device)
    return there, back


def etp_rows(meeting: Tensor, rows: list[int], etp: Axis) -> EtpRows:
    """The rows that meet on the ranks of `etp`, of which each brings meeting[r] (int64 [etp, experts]) by
    expert, and rows[r] in all."""
    experts = ExpertRows(meeting.sum(0), sum(rows))
    return EtpRows(etp, rows, group_by_expert(meeting, experts.total), experts)


def exchange_tokens(n: int, ep: Axis, etp: Axis, device: torch.device) -> Table:
    """`n` of each rank that shares experts with this one; collectives over both axes, with a host wait.

    Plans know these numbers. This is for models that run without a plan.
    """
    table = to_device(np.asarray([n]), device)
    for axis in (ep, etp):
        if axis.size > 1:
            mine, table = table, table.new_empty(axis.size * len(table))
            dist.all_gather_into_tensor(table, mine, group=axis.group)
    out: list[list[int]] = table.view(etp.size, ep.size).tolist()
    return out


def _padded(flat: Tensor, order: Tensor, rows: int, n_experts: int) -> Tensor:
    """The order with exactly `rows` rows for each expert.

    flat: the expert of each row, n_experts for a dropped one. order: the rows sorted by expert.
    """
    counts = tally(flat, n_experts + 1)
    expert = flat[order]
    # Dropped rows go to one slot after all others, which [:-1] removes.
    slot = expert * rows + _rank_in_group(counts, len(flat))
    slot = torch.where(expert < n_experts, slot, n_experts * rows)
    return order.new_full((n_experts * rows + 1,), len(flat)).scatter_(0, slot, order)[:-1]


def group_by_expert(counts: Tensor, total: int) -> Tensor:
    """The order of all ranks' rows, concatenated by rank, that groups them by expert: int64 [total].

    counts: int64 [ranks, experts], rows of each rank for each expert; a rank's rows are sorted by expert.
    total: their sum.
    """
    expert = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts))
    return torch.argsort(expert.repeat_interleave(counts.flatten(), output_size=total), stable=True)
