"""Backward in halves (zero bubble) of every kind of layer: in each dtype, weights' products wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm.config import LLMConfig
from llm.model import LLM, precise_modules
from parallel.schedule.executor.halves import backward_input, backward_weight
from parallel.sharding.param import declared, initialise
from parallel.topology.stage import Stage
from tests.llm.harness import EVERYTHING, Text, make_batch

# Rows of every product are multiples of 16 bytes, as grouped products need them.
CFG = replace(
    EVERYTHING, pattern="-E-", d_model=32, expert_ffn=16, shared_ffn=16, mlp_ffn=32, latent=8, head_dim=8
)
LATENTS: dict[str, object] = {
    **{"pattern": "-*-", "n_kv_heads": 8, "kv_rank": 16, "q_rank": 8, "rope_head_dim": 4, "v_head_dim": 16},
}
TEXT = Text((17, 9, 1), 3, seed=2)


class Grouped(TorchDispatchMode):
    """Counts grouped products."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen += func.overloadpacket is torch.ops.aten._grouped_mm
        return func(*args, **(kwargs or {}))


def stage(cfg: LLMConfig, dtype: torch.dtype) -> LLM:
    model = LLM(cfg, stage=Stage(1, 2, False, False), dtype=torch.float64).train()
    initialise(model, 3, "llm")
    model.to(dtype)
    for module in precise_modules(model):
        module.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return model


def gradients(model: LLM) -> dict[str, Tensor]:
    return {n: p.grad for n, p, _ in declared(model) if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change",
    [{"pattern": f"-{s}-"} for s in "EM*-"] + [{"latent": None}, {"mlp_gated": False}, LATENTS],
    ids=str,
)
def test_gradients_of_weights_wait(change: dict[str, object], dtype: torch.dtype) -> None:
    cfg = replace(CFG, **change)  # type: ignore[arg-type]
    batch, _ = make_batch(TEXT, cfg.vocab_size)
    batch = replace(batch, row_positions={})
    gen = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(TEXT.total, cfg.d_model, generator=gen).to(dtype) for _ in range(2))
    plain, halves = stage(cfg, dtype), stage(cfg, dtype)
    once, entered = x.clone().requires_grad_(), x.clone().requires_grad_()
    with Grouped() as whole:
        plain(batch, {}, once).backward(grad)
    with Grouped() as first:
        kept = backward_input(halves(batch, {}, entered), grad, [entered])
    early = gradients(halves).keys()
    with Grouped() as second:
        backward_weight(kept)
    want, got = gradients(plain), gradients(halves)
    assert torch.equal(entered.grad, once.grad) and got.keys() == want.keys()  # type: ignore[arg-type]
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    matrices = {n for n, p in halves.named_parameters() if p.ndim > 1 and ".conv_" not in n}
    assert matrices and not matrices & early and early == got.keys() - matrices
    experts = sum(".experts." in n for n in matrices)
    assert second.seen == (0 if dtype == torch.float64 else experts)
    assert first.seen + second.seen == whole.seen
