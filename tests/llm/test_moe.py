"""Routing: choice of experts, their weights, counted tokens, and how the bias follows the load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm.balance import choose
from llm.moe import ForwardContext, MoE
from parallel.sequence.packed import Packing
from parallel.topology.axis import Axes
from tests.llm.harness import TINY, Degrees, Text, build, make_axes, make_batch, run_text, tiny


def moe(**changes: Any) -> MoE:
    return build(tiny(pattern="E", **changes)).moe_layers()[0]


def context(n_real: int, tokens: int) -> ForwardContext:
    """A training pass over one document, then padding."""
    return ForwardContext(Packing.of([n_real, tokens - n_real]), n_real, learns=True)


def by_hand(layer: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by hand."""
    cfg = layer.cfg
    logits = x @ layer.router.weight.T
    score = torch.sigmoid(logits) if cfg.router == "sigmoid" else torch.softmax(logits, -1)
    out = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    inner = x if layer.latent_in is None else x @ layer.latent_in.weight.T
    routed = torch.zeros_like(inner)
    for t in range(len(x)):
        ranked = sorted(range(cfg.n_experts), key=lambda e: (-(score[t, e] + layer.expert_bias[e]).item(), e))
        chosen = ranked[: cfg.top_k]
        whole = score[t, chosen].sum() + 1e-20 if cfg.norm_top_k else 1.0
        for e in chosen:
            up = layer.experts.up[e] @ inner[t]
            up = F.silu(layer.experts.gate[e] @ inner[t]) * up if cfg.mlp_gated else F.relu(up).square()
            y = cfg.routed_scale * score[t, e] / whole * (layer.experts.down[e] @ up)
            routed = routed.index_add(0, torch.tensor([t]), y[None])
    return out + (routed if layer.latent_out is None else routed @ layer.latent_out.weight.T)


KINDS_OF_MOE: list[dict[str, Any]] = [
    {},
    {"latent": 6},
    {"mlp_gated": True, "activation": "silu", "latent": 6},
    {"router": "softmax", "norm_top_k": False, "shared_ffn": 0},
]


@pytest.mark.parametrize("changes", KINDS_OF_MOE, ids=str)
def test_chosen_with_bias_weighted_without(changes: dict[str, Any]) -> None:
    layer = moe(**changes)
    x = torch.randn(9, TINY.d_model, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (layer(x, context(9, 9)), by_hand(layer, x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_capacity_drops_the_least_probable_and_nothing_where_there_is_room() -> None:
    x = torch.randn(16, TINY.d_model, dtype=torch.float64)
    free = moe()(x, context(16, 16))
    for pad in (False, True):
        roomy = moe(capacity=float(TINY.n_experts), pad_experts=pad)
        torch.testing.assert_close(roomy(x, context(16, 16)), free, rtol=1e-12, atol=1e-12)
        tight = moe(capacity=0.25, pad_experts=pad)  # two rows an expert at most, of 6 on average
        y = tight(x, context(16, 16))
        assert tight.shared is not None
        routed = (y - tight.shared(x)).abs().sum(1) > 1e-12
        assert 0 < int(routed.sum()) < 16
        assert int(tight.load.sum()) == 16 * TINY.top_k  # counts choices, dropped or not


def test_ties_go_to_the_lowest_index() -> None:
    score = torch.tensor([[0.5, 0.7, 0.5, 0.7, 0.5], [0.1, 0.1, 0.1, 0.1, 0.1]])
    assert choose(score, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert choose(torch.zeros(4, 257), 2).tolist() == [[0, 1]] * 4


def test_padding_is_neither_routed_nor_counted() -> None:
    layer = moe()
    x = torch.randn(12, TINY.d_model, dtype=torch.float64)
    for n_real in (12, 5, 0):
        y = layer(x, context(n_real, 12))
        assert layer.load.sum() == n_real * TINY.top_k
        layer.load.zero_()
        torch.testing.assert_close(y[n_real:], layer.shared(x[n_real:]))
        torch.testing.assert_close(y[:n_real], layer(x, context(12, 12))[:n_real])
        layer.load.zero_()


def test_counted_once_a_training_forward() -> None:
    text = Text((9, 4), 3, seed=5)
    for recompute in (False, True):
        model = build(tiny(pattern="EME"))
        model.recompute = recompute
        for times in (1, 2):
            run_text(model, text)
            assert [int(m.load.sum()) for m in model.moe_layers()] == [13 * TINY.top_k * times] * 2
        with torch.no_grad():
            model(make_batch(text, TINY.vocab_size)[0], {"vision": torch.zeros(0, TINY.d_model)})
        assert int(model.moe_layers()[0].load.sum()) == 26 * TINY.top_k


def test_bias_moves_against_the_load() -> None:
    layer = moe()
    before = layer.expert_bias.clone()
    layer.load += 1
    layer.update_bias(torch.tensor([9, 1, 5, 5, 5, 5, 0, 10]))
    step = TINY.expert_bias_rate * torch.tensor([-1.0, 1, 0, 0, 0, 0, 1, -1], dtype=torch.float64)
    assert torch.equal(layer.expert_bias, before + step)  # in its own dtype
    assert not layer.load.any()


def one_expert_gets_all(degrees: Degrees) -> tuple[list[bool], float]:
    """All tokens go to the experts of rank 0; which expert gradients are not zero, and the input's size."""
    layer = _cut_moe(make_axes(degrees))
    layer.expert_bias.copy_(torch.arange(TINY.n_experts, 0, -1) * 10.0)
    x = torch.ones(4, TINY.d_model, dtype=torch.float64, requires_grad=True)
    layer(x, context(4, 4)).sum().backward()
    experts = [layer.experts.up.grad, layer.experts.down.grad]
    return [bool(g.any()) for g in experts], float(x.grad.abs().sum())


def _cut_moe(axes: Axes) -> MoE:
    return build(tiny(pattern="E"), axes).moe_layers()[0]


def test_ranks_without_tokens_keep_their_gradients(ranks: Any) -> None:
    results = ranks(2, one_expert_gets_all, Degrees(2, ep=2))
    assert [any(nonzero) for nonzero, _ in results] == [True, False]
    assert all(size > 0 for _, size in results)


def widths_exchanged(latent: int | None, dispatcher: Any) -> set[int]:
    """Widths of the rows that a forward and its backward exchange over ep, with either dispatcher."""
    widths: set[int] = set()
    saved = {name: getattr(dist, name) for name in EXCHANGES}

    def note(name: str) -> Any:
        def call(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            widths.update(t.shape[-1] for t in (out, x) if t.is_floating_point() and t.ndim > 1)
            return saved[name](out, x, *args, **kwargs)

        return call

    axes = make_axes(Degrees(2, ep=2))
    layer = build(tiny(pattern="E", latent=latent, dispatcher=dispatcher), axes).moe_layers()[0]
    x = torch.randn(6, TINY.d_model, dtype=torch.float64, requires_grad=True)
    for name in EXCHANGES:
        setattr(dist, name, note(name))
    try:
        layer(x, context(6, 6)).sum().backward()
    finally:
        for name, real in saved.items():
            setattr(dist, name, real)
    return widths


EXCHANGES = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")


@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_both_exchanges_move_latent_rows(dispatcher: str, ranks: Any) -> None:
    k = TINY.top_k  # the all-gather dispatcher also gathers choices and weights
    for latent in (None, 6):
        for widths in ranks(2, widths_exchanged, latent, dispatcher):
            assert widths - {k} == {latent or TINY.d_model}
