"""Fetching rows inside an axis: right rows, summed gradients, least bytes, refusals."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm.fetch import Fetch, fetch_plan, lacking, make_fetch
from parallel.sequence.intervals import Span, overlap
from parallel.topology.axis import Axis

CASES = 25


def draw(n: int, seed: int) -> tuple[list[list[Span]], list[list[Span]]]:
    """Stretches held by n ranks, one or several a rank and in any order, and what each wants."""
    rng = random.Random(seed)
    total = rng.choice([0, 1, 3, 20, 41])
    each = rng.choice([1, 1, 2, 3])
    cuts = [0, *sorted(rng.randint(0, total) for _ in range(each * n - 1)), total]
    parts = list(pairwise(cuts))
    if rng.random() < 0.7:
        rng.shuffle(parts)
    held = [parts[each * r : each * (r + 1)] for r in range(n)]
    wanted = []
    for _ in range(n):
        edges = sorted(rng.randint(0, total) for _ in range(2 * rng.randint(0, 3)))
        wanted.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return held, wanted


def rows_of(x: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([x[a:b] for a, b in spans] or [x[:0]])


def rounds(
    fetch: Fetch, whole: Tensor, held: list[list[Span]], wanted: list[list[Span]], rank: int
) -> list[str]:
    """The same by rounds, the next under way before the last is waited for: what is wrong."""
    n, wrong = len(held), []
    x = rows_of(whole, held[rank])
    coming = [fetch.start_round(x, i) for i in range(n)]
    home, late = torch.zeros_like(x), []
    for i, block in enumerate(coming):
        spans = overlap(wanted[rank], held[(rank - i) % n])
        if not torch.equal(block.wait(), rows_of(whole, spans)):
            wrong.append(f"rows of round {i}")
        late.append(fetch.start_round_home(block.wait() * 3, home, i))
    for flight in late:
        flight.wait()
    readers = torch.zeros(whole.shape[0], dtype=torch.float64)
    for spans in wanted:
        for a, b in spans:
            readers[a:b] += 1
    if not torch.allclose(home, 3 * x * rows_of(readers, held[rank])[:, None, None], rtol=1e-14, atol=0):
        wrong.append("gradients of the rounds")
    return wrong


def fetches(together: bool) -> list[str]:
    """What is wrong, over random cases; two layers share each plan, and rounds are under way in pairs."""
    n, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis("cp", n, rank, dist.group.WORLD) if n > 1 else Axis.single("cp")
    wrong = []
    for seed in range(CASES):
        held, wanted = draw(n, seed)
        total = max(b for spans in held for _, b in spans)
        gen = torch.Generator().manual_seed(seed)
        whole = torch.randn(total, 2, 3, dtype=torch.float64, generator=gen)
        weights = [
            torch.randn(sum(b - a for a, b in w), 2, 3, dtype=torch.float64, generator=gen) for w in wanted
        ]
        fetch = make_fetch(f"case {seed}", axis, held, wanted)
        if fetch.channel is not None:
            fetch = replace(fetch, together=together)
        x = rows_of(whole, held[rank]).clone().requires_grad_()
        once = fetch(x)
        if not torch.equal(once, rows_of(whole, wanted[rank])):
            wrong.append(f"{seed}: rows")
        grad = torch.autograd.grad(((once + fetch(x)) * weights[rank]).sum(), x)[0]
        expected = torch.zeros_like(whole)
        for spans, weight in zip(wanted, weights, strict=True):
            at = torch.cat([torch.arange(a, b) for a, b in spans] or [torch.arange(0)])
            expected.index_add_(0, at, 2 * weight)
        if not torch.allclose(grad, rows_of(expected, held[rank]), rtol=0, atol=1e-12):
            wrong.append(f"{seed}: gradients")
        if fetch(x.detach()).requires_grad:
            wrong.append(f"{seed}: a gradient nobody asked for")
        wrong += [f"{seed}: {what}" for what in rounds(fetch, whole, held, wanted, rank)]
        into = torch.ones_like(x)
        fetch.start_home(weights[rank].bfloat16(), into).wait()
        narrow = torch.zeros_like(whole)
        for spans, weight in zip(wanted, weights, strict=True):
            at = torch.cat([torch.arange(a, b) for a, b in spans] or [torch.arange(0)])
            narrow.index_add_(0, at, weight.bfloat16().double())
        if not torch.allclose(into - 1, rows_of(narrow, held[rank]), rtol=0, atol=1e-12):
            wrong.append(f"{seed}: a sum of narrow gradients is not in the dtype of the sum")
    return wrong


@pytest.mark.parametrize(("n", "together"), [(1, False), (2, False), (3, False), (4, False), (3, True)])
def test_rows_come_and_gradients_are_summed(n: int, together: bool, ranks: Any) -> None:
    assert ranks(n, fetches, together) == [[]] * n


def test_only_rows_that_a_rank_lacks_travel_and_only_once() -> None:
    for seed in range(200):
        n = 1 + seed % 5
        held, wanted = draw(n, seed)
        has, wants = ([{row for a, b in side for row in range(a, b)} for side in s] for s in (held, wanted))
        for r in range(n):
            plan = fetch_plan("rows", held, wanted, r)
            assert plan.received.forward == len(wants[r] - has[r]) == lacking(held, wanted)[r]
            assert plan.received.backward == sum(len(wants[s] & has[r]) for s in range(n) if s != r)
            assert plan.moves == any(wants[s] - has[s] for s in range(n))


def wait_for_the_silent() -> str:
    rank = dist.get_rank()
    held, wanted = [[(r, r + 1)] for r in range(3)], [[(0, 3)], [], []]
    fetch = make_fetch("keys", Axis("cp", 3, rank, dist.group.WORLD), held, wanted, timeout_s=1.0)
    x = torch.ones(1, 2)
    said = ""
    if rank == 0:
        try:
            fetch.start_round(x, 1).wait()
        except RuntimeError as error:
            said = str(error)
    else:
        time.sleep(2.0)  # alive, but rank 2 never sends
    return said


def test_who_is_silent_is_named(ranks: Any) -> None:
    said = ranks(3, wait_for_the_silent)[0]
    assert "keys, forward, round 1: no answer from rank 2 within 1 s" in said


def test_what_cannot_be_fetched_is_refused() -> None:
    held = [[(0, 2)], [(2, 4)]]
    with pytest.raises(ValueError, match=r"rows 4-5 are wanted by rank 0 of the axis, but no rank has them"):
        fetch_plan("rows", held, [[(1, 6)], []], 0)
    with pytest.raises(ValueError, match="must ascend and not overlap"):
        fetch_plan("rows", held, [[(1, 3), (2, 4)], []], 0)
    with pytest.raises(ValueError, match="stretches of 1 ranks are held, but of 2 wanted"):
        fetch_plan("rows", [[(0, 2)]], [[], []], 0)
    with pytest.raises(ValueError, match="a row is held by two ranks"):
        fetch_plan("rows", [[(0, 3)], [(2, 4)]], [[], []], 0)
    with pytest.raises(ValueError, match="3 rows given, the plan has 2"):
        make_fetch("rows", Axis.single("cp"), [[(0, 2)]], [[(0, 1)]])(torch.zeros(3, 1))
