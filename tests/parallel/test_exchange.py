"""Fetching rows inside an axis: right rows, summed gradients, least bytes, refusals."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.axis import Axis
from parallel.boundary import received_rows
from parallel.exchange import Span, fetch_plan, make_fetch

CASES = 25


def draw(n: int, seed: int) -> tuple[list[Span], list[list[Span]]]:
    """Stretches held by n ranks, in rank order or not, and what each wants."""
    rng = random.Random(seed)
    total = rng.choice([0, 1, 3, 20, 41])
    cuts = [0, *sorted(rng.randint(0, total) for _ in range(n - 1)), total]
    held = list(pairwise(cuts))
    rng.shuffle(held)
    wanted = []
    for _ in range(n):
        edges = sorted(rng.randint(0, total) for _ in range(2 * rng.randint(0, 3)))
        wanted.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return held, wanted


def rows_of(x: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([x[a:b] for a, b in spans] or [x[:0]])


def fetches() -> list[str]:
    """What is wrong, over random cases; two layers share each plan."""
    n, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis("cp", n, rank, dist.group.WORLD) if n > 1 else Axis.single("cp")
    wrong = []
    for seed in range(CASES):
        held, wanted = draw(n, seed)
        total = max(b for _, b in held)
        gen = torch.Generator().manual_seed(seed)
        whole = torch.randn(total, 2, 3, dtype=torch.float64, generator=gen)
        weights = [
            torch.randn(sum(b - a for a, b in w), 2, 3, dtype=torch.float64, generator=gen) for w in wanted
        ]
        fetch = make_fetch(f"case {seed}", axis, held, wanted)
        a, b = held[rank]
        x = whole[a:b].clone().requires_grad_()
        once = fetch(x)
        if not torch.equal(once, rows_of(whole, wanted[rank])):
            wrong.append(f"{seed}: rows")
        grad = torch.autograd.grad(((once + fetch(x)) * weights[rank]).sum(), x)[0]
        expected = torch.zeros_like(whole)
        for spans, weight in zip(wanted, weights, strict=True):
            at = torch.cat([torch.arange(a, b) for a, b in spans] or [torch.arange(0)])
            expected.index_add_(0, at, 2 * weight)
        if not torch.allclose(grad, expected[a:b], rtol=0, atol=1e-12):
            wrong.append(f"{seed}: gradients")
        if fetch(x.detach()).requires_grad:
            wrong.append(f"{seed}: a gradient nobody asked for")
    return wrong


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_rows_come_and_gradients_are_summed(n: int, ranks: Any) -> None:
    assert ranks(n, fetches) == [[]] * n


def test_only_rows_that_a_rank_lacks_travel_and_only_once() -> None:
    for seed in range(200):
        n = 1 + seed % 5
        held, wanted = draw(n, seed)
        ranks = [3 * r + 1 for r in range(n)]
        for r in range(n):
            want = {row for a, b in wanted[r] for row in range(a, b)}
            forward, backward = received_rows(fetch_plan("rows", ranks, held, wanted, ranks[r]))
            assert forward == len(want - set(range(*held[r])))
            users = [
                row
                for s in range(n)
                if s != r
                for a, b in wanted[s]
                for row in range(a, b)
                if row in range(*held[r])
            ]
            assert backward == len(users)


def test_what_cannot_be_fetched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows 4-5 are wanted by ranks \(0,\), but no rank has them"):
        fetch_plan("rows", [0, 1], [(0, 2), (2, 4)], [[(1, 6)], []], 0)
    with pytest.raises(ValueError, match="must ascend and not overlap"):
        fetch_plan("rows", [0, 1], [(0, 2), (2, 4)], [[(1, 3), (2, 4)], []], 0)
    with pytest.raises(ValueError, match="2 ranks, but 1 stretches held"):
        fetch_plan("rows", [0, 1], [(0, 2)], [[], []], 0)
    with pytest.raises(ValueError, match="3 rows given, the plan has 2"):
        make_fetch("rows", Axis.single("cp"), [(0, 2)], [[(0, 1)]])(torch.zeros(3, 1))
