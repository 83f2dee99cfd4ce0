"""Groups, balance loss and z-loss against their formulas, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm.balance import attach, choose
from llm.counts import Counts
from llm.model import LLM
from llm.moe import ForwardContext, MoE
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared
from tests.llm.harness import TINY, Text, build, make_batch, tiny, weigh


def moe(**changes: object) -> MoE:
    return build(tiny(pattern="E", **changes)).moe_layers()[0]


@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 2), (4, 3), (8, 5)]))
def test_experts_come_from_the_best_groups(seed: int, limits: tuple[int, int]) -> None:
    groups, best = limits
    gen = torch.Generator().manual_seed(seed)
    # Quarters add up exactly, so that ties are ties.
    score = torch.randn(5, 8, generator=gen).mul(4).round().div(4)
    size = 8 // groups
    k = min(3, best * size)
    chosen = choose(score, k, groups, best)
    for row, mine in zip(score.tolist(), chosen.tolist(), strict=True):
        strength = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: (-strength[g], g))[:best]
        experts = [e for e in range(8) if e // size in allowed]
        assert mine == sorted(experts, key=lambda e: (-row[e], e))[:k]


def objectives(layer: MoE, x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(sum over documents of balance loss times tokens, sum of z-loss over tokens) of one layer."""
    cfg = layer.cfg
    logits = x @ layer.router.weight.T
    score = torch.sigmoid(logits) if cfg.router == "sigmoid" else torch.softmax(logits, -1)
    share = score / score.sum(1, keepdim=True)
    chosen = score.topk(cfg.top_k).indices  # without bias and groups
    balance, at = torch.zeros((), dtype=x.dtype), 0
    for n in lengths:
        if n:
            tokens = torch.bincount(chosen[at : at + n].reshape(-1), minlength=cfg.n_experts)
            of_one = (share[at : at + n].sum(0) * tokens).sum() * cfg.n_experts / (cfg.top_k * n * n)
            balance = balance + n * of_one
        at += n
    return balance, torch.logsumexp(logits, 1).square().sum()


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_objectives_are_their_formulas(router: str) -> None:
    layer = moe(router=router, aux_weight=0.3, z_weight=0.2, expert_groups=4, top_groups=3)
    lengths, padding, routed = [7, 0, 1, 5], 3, 39
    x = torch.randn(16, TINY.d_model, dtype=torch.float64, requires_grad=True)
    ctx = ForwardContext(Packing.of([*lengths, padding]), 13, Counts(routed), learns=True)
    params = [x, layer.router.weight, layer.experts.up]
    ours = torch.autograd.grad(weigh(layer(x, ctx).sum(1)), params)
    balance, z = objectives(layer, x[:13], lengths)
    bare = layer(x, replace(ctx, learns=False))
    whole = weigh(bare.sum(1)) + (0.3 * balance + 0.2 * z) / routed
    for mine, theirs in zip(ours, torch.autograd.grad(whole, params), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    means = torch.stack([balance, z]).detach() / routed
    torch.testing.assert_close(layer.objectives, means, rtol=1e-9, atol=0)


def test_an_even_document_has_balance_loss_one() -> None:
    layer = moe(aux_weight=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()  # equal scores: what is chosen does not matter then
        layer.expert_bias.zero_()
    layer(torch.ones(8, TINY.d_model, dtype=torch.float64), ForwardContext(Packing.of([8]), 8, learns=True))
    assert float(layer.objectives[0]) == pytest.approx(8.0)  # one a token, times tokens


def test_objectives_are_counted_once_and_taken() -> None:
    cfg = tiny(pattern="EME", aux_weight=0.3, z_weight=0.2, mtp_layers=1)
    batch, _ = make_batch(Text((9, 4), 3, seed=5), cfg.vocab_size)
    rows = {"vision": torch.zeros(0, cfg.d_model, dtype=torch.float64)}
    taken = []
    for recompute in (False, True):
        model = build(cfg)
        model.recompute = recompute
        with torch.no_grad():
            model(batch, rows)  # an evaluation counts nothing
        model(batch, rows).sum().backward()
        taken.append(model.take_objectives())
        assert all(float(v) == 0.0 for v in model.take_objectives().values())
    assert all(float(v) > 0.0 for v in taken[0].values())
    assert taken[0] == taken[1]


def test_objectives_do_not_touch_the_reported_loss() -> None:
    batch, _ = make_batch(Text((9, 4), 3, seed=5), TINY.vocab_size)
    rows = {"vision": torch.zeros(0, TINY.d_model, dtype=torch.float64)}
    plain, weighted = build(TINY), build(tiny(aux_weight=0.3, z_weight=0.2))
    ours, theirs = weighted(batch, rows), plain(batch, rows)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    routers = [torch.equal(a.router.weight.grad, b.router.weight.grad) for a, b in _routers(weighted, plain)]
    assert not any(routers)
    assert all(p.grad is not None for _, p, _ in declared(weighted))


def _routers(a: LLM, b: LLM) -> list[tuple[MoE, MoE]]:
    return list(zip(a.moe_layers(), b.moe_layers(), strict=True))


def test_attach_adds_a_scaled_gradient_only() -> None:
    x, w = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = attach(x, w.square().sum(), 0.5)
    assert torch.equal(y, x)
    d_x, d_w = torch.autograd.grad(y.sum(), (x, w))
    torch.testing.assert_close(d_x, torch.ones_like(x))
    torch.testing.assert_close(d_w, w.detach())
