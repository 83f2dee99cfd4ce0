"""Properties of the whole model that do not concern layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.config import LLMConfig
from llm.model import LLM, LLMBatch, precise_modules
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared, initialise
from tests.llm.harness import EVERYTHING, TINY, Text, build, far, make_batch, make_rows, run_text, tiny, weigh


def gradients(model: LLM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p, _ in declared(model)}


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", TINY.pattern])
def test_packed_documents_are_separate_documents(pattern: str) -> None:
    text = Text((13, 1, 22, 5), 3, seed=8)
    batch, _ = make_batch(text, TINY.vocab_size)
    packed, separate = build(tiny(pattern=pattern)), build(tiny(pattern=pattern))
    loss = packed(batch, {"vision": make_rows(text, TINY.d_model)})
    loss.sum().backward()
    losses = []
    for first, last in zip(batch.packing.starts[:4], batch.packing.starts[1:5], strict=True):
        one = LLMBatch(
            batch.ids[first:last],
            batch.labels[first:last],
            Packing.of([last - first]),
            int(last - first),
            {},
        )
        losses.append(separate(one, {}))
        losses[-1].sum().backward()
    torch.testing.assert_close(loss[: batch.n_real], torch.cat(losses), rtol=1e-9, atol=1e-12)
    assert not loss[batch.n_real :].any()
    assert not far(gradients(packed), gradients(separate))


def test_padding_changes_nothing() -> None:
    whole, padded = build(TINY), build(TINY)
    loss = run_text(whole, Text((13, 9), 0, seed=4))["loss"]
    ids = make_batch(Text((13, 9), 0, seed=4), TINY.vocab_size)[0]
    longer = LLMBatch(
        F.pad(ids.ids, (0, 6), value=1),
        F.pad(ids.labels, (0, 6), value=-100),
        Packing.of([13, 9, 6]),
        22,
        {},
    )
    out = padded(longer, {})
    weigh(out).backward()
    torch.testing.assert_close(out[:22], loss, rtol=1e-9, atol=1e-12)
    assert not far(gradients(padded), gradients(whole))


def test_recomputation_changes_nothing() -> None:
    text = Text((13, 9), 2, seed=4, rows_at=(3, 4))
    results = []
    for recompute in (False, True):
        model = build(TINY)
        model.recompute = recompute
        out = run_text(model, text)
        results.append((out["loss"], gradients(model)))
    torch.testing.assert_close(*(r[0] for r in results))
    assert not far(results[1][1], results[0][1])


def test_placeholders_do_not_train_the_embedding() -> None:
    text = Text((10,), 0, seed=1, rows_at=(2, 7))
    batch, _ = make_batch(text, TINY.vocab_size - 1)
    ids = batch.ids.clone()
    ids[list(text.rows_at)] = TINY.vocab_size - 1
    model = build(TINY)
    rows = make_rows(text, TINY.d_model).requires_grad_()
    model(replace(batch, ids=ids), {"vision": rows}).sum().backward()
    assert rows.grad is not None and (rows.grad.abs().sum(1) > 0).all()
    assert not model.embed.weight.grad[-1].any()
    assert model.embed.weight.grad[ids[0]].any()


def test_an_edge_without_rows_stays_in_the_graph() -> None:
    model = build(TINY)
    batch, _ = make_batch(Text((6,), 0, seed=1), TINY.vocab_size)
    rows = torch.zeros(0, TINY.d_model, dtype=torch.float64, requires_grad=True)
    model(batch, {"vision": rows}).sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [TINY, EVERYTHING], ids=["tiny", "everything"])
def test_narrow_weights_with_precise_ones(kind: LLMConfig, dtype: torch.dtype) -> None:
    """bfloat16 weights with precise ones in float32, as mixed precision gathers them."""
    cfg = replace(kind, d_model=32, expert_ffn=16, init_std=0.05)
    text = Text((20, 13), 3, seed=6, rows_at=(4,))
    exact = build(cfg)
    expected = run_text(exact, text)["loss"].sum()
    model = LLM(cfg, dtype=torch.float32)
    initialise(model, 3, "llm")
    kept = {p for module in precise_modules(model) for p in module.parameters()}
    assert kept == {p for _, p, spec in declared(model) if spec.precise}
    for p in model.parameters():
        p.data = p.data if p in kept else p.data.to(dtype)
    for moe, reference in zip(model.moe_layers(), exact.moe_layers(), strict=True):
        moe.expert_bias.copy_(reference.expert_bias)
    loss = run_text(model, text)["loss"]
    assert loss.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(float(loss.sum() - expected)) < tolerance * float(expected)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


class _Floats(TorchDispatchMode):
    """Which floating dtypes operations on floating tensors give (a mask of constants may be narrow)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x.ndim for x in _floating((args, kwargs))):
            self.seen |= {x.dtype: func for x in _floating(out)}
        return out


def _floating(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_float64_runs_hold_every_value_in_float64(recompute: str) -> None:
    """Else parity would be blurred: router, objectives, scan and losses included."""
    model = build(EVERYTHING)
    model.recompute = recompute
    text = Text((20, 13), 3, seed=6, rows_at=(4,))
    batch, rows = make_batch(text, EVERYTHING.vocab_size)[0], make_rows(text, EVERYTHING.d_model)
    with _Floats() as floats:
        model(batch, {"vision": rows}).sum().backward()
    assert set(floats.seen) == {torch.float64}, floats.seen
