"""What is kept from forward to backward, in bytes; that no result changes; that routing is decided once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import llm.moe
from llm.model import LLM
from llm.offload import OnHost, to_host
from llm.recompute import PARTS, recompute_parts
from parallel.sharding.param import declared, initialise
from tests.kept import kept_bytes
from tests.llm.harness import TINY, Text, build, make_batch, run_text, tiny

CFG = tiny(pattern="M*E-", latent=8, mtp_layers=1, aux_weight=0.1, z_weight=0.1, mlp_gated=True)
TEXT = Text((40, 23), 1, seed=3)


def run_with(recompute: Any, offload: int | None = None, cfg: Any = CFG) -> dict[str, Tensor]:
    model = build(cfg)
    model.recompute, model.offload = recompute, offload
    loss = run_text(model, TEXT)["loss"]
    grads = {name: p.grad for name, p, _ in declared(model) if p.grad is not None}
    loads = {f"load {i}": m.load for i, m in enumerate(model.moe_layers())}
    return {"loss": loss, **grads, **loads, **model.take_objectives()}


@pytest.mark.parametrize("recompute", [*PARTS, ["mlp", "moe_act", "norm", "scan", "attention_core"]], ids=str)
@pytest.mark.parametrize("offload", [None, 1])
def test_nothing_changes(recompute: Any, offload: int | None) -> None:
    """To the last bit: the same operations in the same order."""
    ours, theirs = run_with(recompute, offload), run_with("none")
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in theirs.items() if not torch.equal(ours[name], value)]


GATED: dict[str, Any] = {"mlp_gated": True, "activation": "silu"}


def layer_bytes(symbol: str, recompute: Any, **changes: Any) -> int:
    cfg = tiny(pattern=symbol, d_model=32, mlp_ffn=256, expert_ffn=128, shared_ffn=64, **changes)
    model = LLM(cfg, dtype=torch.float32)
    initialise(model, 3, "llm")
    model.recompute = recompute
    batch, _ = make_batch(Text((256,), 0, seed=1), cfg.vocab_size)
    return kept_bytes(lambda: model(batch, {"vision": torch.zeros(0, cfg.d_model)}), model)


@pytest.mark.parametrize(
    ("symbol", "part"), [("M", "scan"), ("*", "attention_core"), ("-", "mlp"), ("E", "moe_act"), ("E", "mlp")]
)
def test_each_part_keeps_less(symbol: str, part: str) -> None:
    nothing, some, full = (layer_bytes(symbol, r, **GATED) for r in ("none", part, "full"))
    assert full < some < nothing


def test_the_loss_keeps_as_much_for_any_length_and_vocabulary() -> None:
    """Apart from one chunk of logits, kept bytes a token do not depend on the vocabulary."""
    kept: dict[tuple[int, int], int] = {}
    for tokens, vocab in itertools.product((64, 256), (40, 4000)):
        cfg = tiny(pattern="-", vocab_size=vocab, loss_chunk=32, mtp_layers=1, mtp_pattern="-")
        model = LLM(cfg, dtype=torch.float32)
        initialise(model, 3, "llm")
        batch, _ = make_batch(Text((tokens,), 0, seed=1), vocab)
        rows = {"vision": torch.zeros(0, cfg.d_model)}
        kept[tokens, vocab] = kept_bytes(lambda m=model, b=batch, r=rows: m(b, r), model)  # type: ignore[misc]
    assert kept[256, 4000] - kept[64, 4000] == kept[256, 40] - kept[64, 40] > 0
    # The next token's loss and that of multi-token prediction keep a chunk each.
    assert kept[64, 4000] - kept[64, 40] == 2 * 32 * (4000 - 40) * 4


def test_what_each_part_no_longer_keeps() -> None:
    """Counted by hand: T = 256 tokens in float32."""
    t = 256 * 4
    # The activation's output, which the product after it keeps too; its input is not kept.
    assert layer_bytes("-", "none") - layer_bytes("-", "mlp") >= 256 * t
    # With a gate: the results of up and gate are kept, and nothing that the activation computes from them.
    assert layer_bytes("E", "none", **GATED) - layer_bytes("E", "moe_act", **GATED) >= 2 * 3 * 128 * t


def test_a_norm_keeps_its_input_only() -> None:
    """In bfloat16, where the norm computes in float32, its wide copy is not kept."""
    cfg = tiny(pattern="-", d_model=64, mlp_ffn=8)
    bytes_kept = []
    for recompute in ("none", "norm"):
        model = LLM(cfg, dtype=torch.bfloat16)
        initialise(model, 3, "llm")
        model.recompute = recompute
        batch, _ = make_batch(Text((256,), 0, seed=1), cfg.vocab_size)
        rows = {"vision": torch.zeros(0, cfg.d_model)}
        bytes_kept.append(kept_bytes(lambda m=model, b=batch, r=rows: m(b, r), model))  # type: ignore[misc]
    # The float32 copy of 256 x 64 goes, the bfloat16 input stays.
    assert bytes_kept[0] - bytes_kept[1] >= 256 * 64 * (4 - 2)


def test_routing_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed layers take the route of the forward, although the bias has changed since."""
    calls = []
    real = llm.moe.plan_route
    monkeypatch.setattr(llm.moe, "plan_route", lambda *a, **k: calls.append(1) or real(*a, **k))
    grads = []
    for disturb in (False, True):
        model = build(tiny(pattern="EE"))
        model.recompute = "full"
        batch, _ = make_batch(TEXT, TINY.vocab_size)
        loss = model(batch, {"vision": torch.zeros(0, TINY.d_model, dtype=torch.float64)}).sum()
        assert len(calls) == 2 * (1 + disturb)
        if disturb:
            for moe in model.moe_layers():
                moe.expert_bias.copy_(-moe.expert_bias * 100)
        loss.backward()
        assert len(calls) == 2 * (1 + disturb)
        grads.append({n: p.grad for n, p, _ in declared(model)})
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


def test_only_large_activations_go_to_the_host() -> None:
    model = build(CFG)
    weight = model.head_weight()
    with to_host(model, 100) as hooks:
        assert hooks is None
        large, small = torch.ones(50, requires_grad=True), torch.ones(3, requires_grad=True)
        y = (large * 2.0).square().sum() + (small * 2.0).square().sum() + (weight[:5] * weight[:5]).sum()
    y.backward()
    torch.testing.assert_close(large.grad, torch.full((50,), 8.0))
    kept = OnHost.of(torch.arange(6.0).view(2, 3).t())
    assert torch.equal(kept.back(), torch.arange(6.0).view(2, 3).t())
    assert kept.copy.device.type == "cpu"


def test_which_tensors_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight goes, and with whole layers recomputed only their inputs go."""
    sent: list[Tensor] = []
    real = OnHost.of
    monkeypatch.setattr(OnHost, "of", staticmethod(lambda x: sent.append(x) or real(x)))
    model = build(tiny(pattern="-*"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch, _ = make_batch(TEXT, TINY.vocab_size)
    rows = {"vision": torch.zeros(0, TINY.d_model, dtype=torch.float64)}
    model.offload = 8 * 64 * 16  # one hidden state [T, d]
    model(batch, rows)
    assert len(sent) > 4
    assert not [x for x in sent if x.untyped_storage().data_ptr() in weights]
    assert all(x.numel() >= 64 * 16 for x in sent)
    sent.clear()
    model.recompute = "full"
    model(batch, rows).sum().backward()
    assert [tuple(x.shape) for x in sent] == [(64, 16)] * 2


@pytest.mark.parametrize(
    ("value", "parts"), [(True, {"full"}), (False, set()), ("none", set()), ("mlp", {"mlp"})]
)
def test_names(value: Any, parts: set[str]) -> None:
    assert recompute_parts(value) == parts
    with pytest.raises(ValueError, match="did you mean moe_act"):
        recompute_parts(["mlp", "moe_akt"])
