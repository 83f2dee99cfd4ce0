"""Dispatch moves each row to its expert's rank and back; grouped products are products per expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert_parallel.all_gather import GatherRoute, gather_combine, gather_dispatch, plan_gather
from parallel.expert_parallel.all_to_all import combine, dispatch
from parallel.expert_parallel.expert_tensor import gather_rows, reduce_rows
from parallel.expert_parallel.grouped import ExpertRows, grouped_linear
from parallel.expert_parallel.routing import (
    Route,
    capacity_rows,
    exchange_tokens,
    plan_route,
    within_capacity,
)
from parallel.topology.axis import Axis
from tests.host_waits import HostWaits

EXPERTS, WIDTH, CHOICES = 8, 3, 2


def world(name: str = "ep") -> Axis:
    if dist.get_world_size() == 1:
        return Axis.single(name)
    return Axis(name, dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def tokens_of(rank: int, counts: list[int], spread: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, d], chosen experts [n, k] and weights [n, k] of one rank."""
    gen = torch.Generator().manual_seed(rank)
    n = counts[rank]
    x = torch.randn(n, WIDTH, generator=gen, dtype=torch.float64)
    chosen = torch.rand(n, EXPERTS, generator=gen).argsort(1)[:, :CHOICES]
    if spread == "last":
        chosen = torch.tensor([EXPERTS - 1, EXPERTS - 2]).expand(n, CHOICES)
    return x.requires_grad_(), chosen, torch.rand(n, CHOICES, generator=gen, dtype=torch.float64)


def kept(chosen: Tensor, weight: Tensor, factor: float | None) -> tuple[Tensor | None, int]:
    """Which choices a capacity leaves, None for all, and the rows that each expert may take."""
    if factor is None:
        return None, 0
    rows = capacity_rows(chosen.numel(), EXPERTS, factor)
    return within_capacity(chosen, weight, EXPERTS, rows), rows


def exchange(
    counts: list[int], spread: str, gather: bool = False, factor: float | None = None, pad: bool = False
) -> tuple[Tensor, ...]:
    """Each expert e multiplies by e + 1: outputs, input gradients, rows per local expert, grouped rows."""
    axis = world()
    x, chosen, weight = tokens_of(axis.rank, counts, spread)
    weight.requires_grad_()
    keep, _ = kept(chosen, weight, factor)
    if gather:
        gathered = plan_gather(chosen, EXPERTS, axis, counts, keep=keep)
        experts, rows = gathered.experts, gather_dispatch(x, gathered)
    else:
        room = [[capacity_rows(n * CHOICES, EXPERTS, factor or 0.0) for n in counts]]
        route = plan_route(chosen, EXPERTS, axis, keep=keep, pad=room if pad else None)
        experts, rows = route.experts, dispatch(x, route)
    per_expert = experts.listed
    assert experts.total == sum(per_expert)
    local = EXPERTS // axis.size
    expert = torch.arange(local).repeat_interleave(torch.tensor(per_expert)) + axis.rank * local
    out = rows * (expert + 1.0).unsqueeze(1)
    y = gather_combine(out, weight, gathered) if gather else combine(out, weight, route)
    d_x, d_weight = torch.autograd.grad(y.square().sum(), (x, weight))
    return y.detach(), d_x, d_weight, torch.tensor(per_expert), rows.detach()


def exchange_all(counts: list[int], spread: str, ways: list[dict[str, Any]]) -> list[tuple[Tensor, ...]]:
    return [exchange(counts, spread, **way) for way in ways]


WAYS: list[dict[str, Any]] = [
    {},
    {"gather": True},
    {"factor": 0.7},
    {"factor": 0.7, "gather": True},
    {"factor": 1.2, "pad": True},
    {"factor": 8.0, "pad": True},  # room for all
]


@pytest.mark.parametrize("spread", ["any", "last"])
@pytest.mark.parametrize("counts", [[5], [4, 7], [0, 6], [0, 0], [3, 0, 9, 1]])
def test_there_and_back(counts: list[int], spread: str, ranks: Any) -> None:
    ways = [way for way in WAYS if len(counts) > 1 or not way.get("gather")]
    results = ranks(len(counts), exchange_all, counts, spread, ways)
    for i, way in enumerate(ways):
        there_and_back(counts, spread, way, [r[i] for r in results])


def there_and_back(
    counts: list[int], spread: str, way: dict[str, Any], results: list[tuple[Tensor, ...]]
) -> None:
    loads = torch.zeros(EXPERTS, dtype=torch.int64)
    for rank, (y, d_x, d_weight, _, _) in enumerate(results):
        x, chosen, weight = tokens_of(rank, counts, spread)
        weight.requires_grad_()
        keep, rows = kept(chosen, weight, way.get("factor"))
        left = torch.ones_like(chosen, dtype=torch.bool) if keep is None else keep
        expected = (weight * left * (chosen + 1.0)).sum(1, keepdim=True) * x
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        for ours, theirs in zip(
            (d_x, d_weight), torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        loads += rows if way.get("pad") else torch.bincount(chosen[left], minlength=EXPERTS)
    assert torch.equal(torch.cat([r[3] for r in results]), loads)
    assert all(len(r[4]) == r[3].sum() for r in results)


def folded() -> tuple[Axis, Axis]:
    """ep and etp of 2 ranks each, etp the faster."""
    rank, pairs = dist.get_rank(), {"ep": ((0, 2), (1, 3)), "etp": ((0, 1), (2, 3))}
    made = {name: [dist.new_group(list(p)) for p in both] for name, both in pairs.items()}
    at = {"ep": divmod(rank, 2)[::-1], "etp": divmod(rank, 2)}  # (which of the pairs, which in it)
    ep, etp = (Axis(name, 2, at[name][1], made[name][at[name][0]]) for name in pairs)
    return ep, etp


def fold(counts: list[int], ways: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """exchange() where each expert is two slices, whose partial results are a quarter and three of the whole;
    by way, (outputs, input gradients, waits of the host)."""
    ep, etp = folded()
    table = [[counts[2 * e + r] for e in range(2)] for r in range(2)]
    out = []
    for way in ways:
        x, chosen, weight = tokens_of(dist.get_rank(), counts, "any")
        keep, _ = kept(chosen, weight, way.get("factor"))
        with HostWaits() as waits:
            assert exchange_tokens(counts[dist.get_rank()], ep, etp, x.device) == table
            waits.places.clear()
            route: Route | GatherRoute
            if way.get("gather"):
                route = plan_gather(chosen, EXPERTS, ep, table[etp.rank], etp=etp, keep=keep)
                rows = gather_dispatch(x, route)
            else:
                room = [
                    [capacity_rows(n * CHOICES, EXPERTS, way.get("factor", 0.0)) for n in r] for r in table
                ]
                pad = room if way.get("pad") else None
                route = plan_route(chosen, EXPERTS, ep, etp=etp, keep=keep, pad=pad)
                rows = dispatch(x, route)
            assert route.etp is not None
            ends = route.etp.experts.ends  # what a grouped product reads
            expert = torch.searchsorted(ends, torch.arange(route.etp.experts.total), right=True) + 4 * ep.rank
            parts = gather_rows(rows, route.etp) * ((expert + 1) * (0.25 + 0.5 * etp.rank)).unsqueeze(1)
            rows = reduce_rows(parts, route.etp)
            y = (
                combine(rows, weight, route)
                if isinstance(route, Route)
                else gather_combine(rows, weight, route)
            )
            torch.autograd.backward(y.square().sum())
        out.append((y.detach(), x.grad, len(waits.places)))
    return out


def test_there_and_back_between_slices_with_one_wait(ranks: Any) -> None:
    counts = [3, 0, 9, 1]
    for rank, results in enumerate(ranks(4, fold, counts, WAYS)):
        for way, (y, d_x, waits) in zip(WAYS, results, strict=True):
            x, chosen, weight = tokens_of(rank, counts, "any")
            keep, _ = kept(chosen, weight, way.get("factor"))
            left = torch.ones_like(chosen, dtype=torch.bool) if keep is None else keep
            expected = (weight * left * (chosen + 1.0)).sum(1, keepdim=True) * x
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
            torch.autograd.backward(expected.square().sum())
            torch.testing.assert_close(d_x, x.grad, rtol=1e-12, atol=1e-13)
            assert waits == (0 if way.get("pad") else 1)


@pytest.mark.parametrize(("factor", "waits"), [(None, 0), (0.7, 1)])
def test_without_an_exchange_only_dropped_rows_are_counted(factor: float | None, waits: int) -> None:
    x, chosen, weight = tokens_of(0, [9], "any")
    keep, _ = kept(chosen, weight, factor)
    with HostWaits() as found:
        route = plan_route(chosen, EXPERTS, Axis.single("ep"), keep=keep)
        rows = dispatch(x.float(), route)
        weights = torch.ones(EXPERTS, 4, WIDTH)
        y = combine(grouped_linear(rows, weights, route.experts), weight.float(), route)
        torch.autograd.backward(y.sum())
    assert len(found.places) == waits


def test_the_best_scored_remain() -> None:
    gen = torch.Generator().manual_seed(0)
    chosen = torch.rand(20, EXPERTS, generator=gen).argsort(1)[:, :CHOICES]
    score = torch.rand(20, CHOICES, generator=gen)
    keep = within_capacity(chosen, score, EXPERTS, 3)
    for e in range(EXPERTS):
        scores = score[chosen == e].sort(descending=True).values
        assert torch.equal(score[(chosen == e) & keep].sort(descending=True).values, scores[:3])
    assert capacity_rows(40, EXPERTS, 0.5) == 3  # 2.5, rounded up
    assert capacity_rows(0, EXPERTS, 0.5) == 1


def grouped(x: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    return grouped_linear(x, weight, ExpertRows(torch.tensor(per_expert), sum(per_expert)))


def by_loop(x: Tensor, weight: Tensor, per_expert: list[int]) -> Tensor:
    return torch.cat([p @ w.T for p, w in zip(x.split(per_expert), weight.unbind(0), strict=True)])


@pytest.mark.parametrize("per_expert", [[3, 0, 5, 1], [0, 0, 0, 9], [1, 1, 1, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize(
    ("dtype", "widths", "tolerance"),
    [
        (torch.float32, (8, 12), 1e-5),
        (torch.float32, (7, 12), 1e-5),  # rows that are not a multiple of 16 bytes
        (torch.float32, (8, 7), 1e-5),  # nor are results
        (torch.float64, (8, 12), 1e-12),
        (torch.bfloat16, (8, 16), 2e-2),
        (torch.bfloat16, (12, 16), 2e-2),
    ],
)
def test_grouped_product(
    dtype: torch.dtype, widths: tuple[int, int], tolerance: float, per_expert: list[int]
) -> None:
    gen = torch.Generator().manual_seed(0)
    d_in, d_out = widths
    rows = torch.randn(sum(per_expert), d_in, generator=gen, dtype=torch.float64)
    weight = torch.randn(len(per_expert), d_out, d_in, generator=gen, dtype=torch.float64)
    results = []
    for kind, fn in ((dtype, grouped), (torch.float64, by_loop)):
        x, w = rows.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        y = fn(x, w, per_expert)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, w))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        if theirs.numel():
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_order_within_an_expert_is_rank_then_token(ranks: Any) -> None:
    """So results do not depend on arrival times."""
    results = ranks(2, exchange, [4, 7], "last")
    sent = [tokens_of(r, [4, 7], "last")[0].detach() for r in range(2)]
    rows = results[1][4]
    assert torch.equal(rows, torch.cat([*sent, *sent]))
