"""The head works on tokens that have a loss, and on no others; nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm.model import LLM, LLMBatch, loss_rows
from llm.mtp import ahead
from parallel.sharding.param import declared
from parallel.tensor_parallel.loss import vocab_loss
from tests.llm.harness import EVERYTHING, Degrees, Text, build, far, make_axes, make_batch, make_rows, weigh

CFG = replace(EVERYTHING, loss_chunk=5)


def results(model: LLM, batch: LLMBatch, text: Text) -> tuple[Tensor, Tensor, dict[str, Any]]:
    loss = model(batch, {"vision": make_rows(text, CFG.d_model)})
    weigh(loss).backward()
    return loss.detach(), model.take_objectives()["mtp"], {n: p.grad for n, p, _ in declared(model)}


def with_rows(batch: LLMBatch) -> LLMBatch:
    mtp = ahead(batch.ids, batch.labels, batch.packing, CFG.mtp_layers)
    return replace(batch, loss_rows=loss_rows(batch.labels, mtp[1]))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_rows_change_nothing(share: float, seed: int) -> None:
    text = Text((17, 1, 8), 3, seed=seed, rows_at=(2, 3, 9))
    batch, _ = make_batch(text, CFG.vocab_size)
    gen = torch.Generator().manual_seed(seed)
    labels = batch.labels.masked_fill(torch.rand(len(batch.labels), generator=gen) >= share, -100)
    batch = replace(batch, labels=labels)
    batches = (batch, with_rows(batch))
    (loss, mtp, grads), (also, also_mtp, same) = (results(build(CFG), b, text) for b in batches)
    torch.testing.assert_close(also, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(also_mtp, mtp, rtol=1e-9, atol=1e-12)
    assert not far(same, grads)


def test_the_head_sees_no_other_token(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(hidden: Tensor, weight: Tensor, labels: Tensor, *given: Any, **named: Any) -> Tensor:
        seen.append(labels)
        return vocab_loss(hidden, weight, labels, *given, **named)

    monkeypatch.setattr("llm.model.vocab_loss", spy)
    batch, _ = make_batch(Text((20, 6), 2, seed=3), CFG.vocab_size)
    build(CFG)(with_rows(batch), {"vision": torch.zeros(0, CFG.d_model, dtype=torch.float64)})
    assert len(seen) == 1 + CFG.mtp_layers and all((labels >= 0).all() for labels in seen)
    assert len(seen[-1]) == int((batch.labels >= 0).sum()) < len(batch.labels)


def without_loss() -> float:
    """Sum of the losses and gradients of a sharded head where no token has a loss."""
    axes = make_axes(Degrees(dist.get_world_size(), tp=dist.get_world_size()))
    batch, _ = make_batch(Text((8,), 0, seed=1), CFG.vocab_size, axes)
    batch = replace(batch, labels=torch.full_like(batch.labels, -100))
    model = build(replace(CFG, aux_weight=0.0, z_weight=0.0), axes)
    loss = model(with_rows(batch), {"vision": torch.zeros(0, CFG.d_model, dtype=torch.float64)})
    loss.sum().backward()
    assert all(p.grad is not None for _, p, _ in declared(model))
    return float(loss.abs().sum() + sum(p.grad.abs().sum() for _, p, _ in declared(model)))


def test_a_rank_without_loss_has_gradients_of_zero(ranks: Any) -> None:
    assert ranks(2, without_loss) == [0.0, 0.0]
