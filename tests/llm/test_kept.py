"""What is kept from forward to backward: activations, and no copies of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.config import LLMConfig
from llm.model import LLM, LLMBatch, precise_modules
from parallel.sequence.packed import Packing
from parallel.sharding.param import initialise
from parallel.sharding.shard import ShardPolicy, materialise, shard_module
from parallel.topology.layout import make_layout
from parallel.topology.mesh import build_mesh
from tests.kept import beside_activations
from tests.llm.harness import tiny

CFG = tiny(
    d_model=64, vocab_size=96, n_heads=4, n_kv_heads=2, head_dim=16, mamba_head_dim=16, mamba_state=16,
    mamba_groups=2, chunk=32, n_experts=4, top_k=2, expert_ffn=64, shared_ffn=64, mlp_ffn=128,
    init_std=0.02, loss_chunk=1024,
)  # fmt: skip
# Every way to hold weights, with the rest of the model around it.
CASES = {
    "M": {},
    "*": {"attention_bias": True, "rope_theta": 100.0},
    "-": {"mlp_gated": True, "mlp_bias": True},
    "E": {"aux_weight": 0.1, "z_weight": 0.1, "mlp_gated": True},
    "E latent": {"latent": 16, "activation": "silu"},
    "M multi-token prediction, tied": {"mtp_layers": 2, "tied": True},
}
TOKENS = 64


def config(case: str) -> LLMConfig:
    return replace(CFG, pattern=case[0], **CASES[case])  # type: ignore[arg-type]


def forward(model: LLM, units: int) -> Tensor:
    """Losses of one document."""
    tokens = units * TOKENS
    gen = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, CFG.vocab_size, (2, tokens), generator=gen)
    loss: Tensor = model(LLMBatch(ids, labels, Packing.of([tokens]), tokens, {}), {})
    return loss


def vectors(model: nn.Module) -> int:
    """Bytes in float32 of the weights that are no matrices: of norms, heads and convolutions."""
    return 4 * sum(p.numel() for p in model.parameters() if p.ndim == 1 or p.shape[-1] <= CFG.conv_kernel)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weights_are_kept_as_activations(case: str, dtype: torch.dtype) -> None:
    model = LLM(config(case), dtype=torch.float32).train()
    initialise(model, 1, "llm")
    model.to(dtype)
    for module in precise_modules(model):
        module.float()
    fixed, a_token = beside_activations(lambda n: forward(model, n), model, TOKENS)
    assert 0 <= fixed <= 2 * vectors(model), (fixed, vectors(model), a_token)


def sharded(case: str) -> tuple[int, int, int]:
    """As beside_activations(), of a model whose layers are freed after their forward, and its vectors."""
    mesh = build_mesh(make_layout("llm", 1, {}), "cpu")
    assert mesh is not None
    model = LLM(config(case), mesh.axes, device="meta", dtype=torch.float32).train()
    counted = vectors(model)
    layers = [*model.layers, *([] if model.mtp is None else model.mtp.layers)]
    policy = ShardPolicy(layers, torch.bfloat16, precise_modules(model))
    shard_module(model, mesh, policy, param_dtype=torch.float32)
    materialise(model, mesh, seed=1, name="llm", device=torch.device("cpu"))
    found = beside_activations(lambda n: forward(model, n), model, TOKENS)
    mesh.close()
    return *found, counted


def all_sharded() -> dict[str, tuple[int, int, int]]:
    return {case: sharded(case) for case in CASES}


def test_sharded_weights_are_freed_until_the_backward(ranks: Any) -> None:
    for case, (fixed, a_token, counted) in ranks(1, all_sharded)[0].items():
        assert 0 <= fixed <= 2 * counted, (case, fixed, counted, a_token)
