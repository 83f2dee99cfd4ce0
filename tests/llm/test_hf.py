"""Published checkpoints: the same logits and gradients as transformers, the same bytes back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm import load_hf
from llm.hf import CausalLM
from llm.hf.weights import checkpoint_tensors
from parallel.published import join
from parallel.sequence.packed import Packing
from tests.llm.oracle import oracle, run, save

MODELS = [
    ("MEM*EM-E", {}),
    ("M", {}),
    ("*-", {}),
    ("E*", {}),
    ("M-M*-", {"n_groups": 8, "num_key_value_heads": 4}),
    ("EM", {"num_experts_per_tok": 5, "norm_topk_prob": False, "routed_scaling_factor": 0.7}),
    ("MEM*E", {"moe_latent_size": 16}),
    ("EM*E", {"n_group": 4, "topk_group": 2}),
    ("E-", {"n_group": 2, "topk_group": 1, "moe_latent_size": 24, "num_experts_per_tok": 3}),
    ("E-", {"mlp_bias": True, "mlp_hidden_act": "silu"}),
    ("M*", {"chunk_size": 64, "conv_kernel": 2, "mamba_head_dim": 12, "head_dim": 24}),
]


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def far(ours: Tensor, theirs: Tensor, least: float = 1e-30) -> float:
    """Largest difference, relative to the largest element, or to `least`."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=least))


def published(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The oracle's tensors (kind: value, or grad) under their published names: experts one by one."""
    out = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if kind == "grad" and not isinstance(tensor, nn.Parameter):
            continue
        value = tensor.detach() if kind == "value" else tensor.grad
        assert value is not None, f"{name} has no gradient"
        name = name.replace("model.", "backbone.", 1)
        if ".experts." in name:
            stem, _, leaf = name.rpartition(".")
            out |= {f"{stem}.{e}.{leaf}.weight": one for e, one in enumerate(value.unbind())}
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("pattern", "sizes"), MODELS)
def test_logits_and_gradients(
    tmp_path: Path, pattern: str, sizes: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    theirs = oracle(pattern, dtype=dtype, **sizes)
    ids = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(1))  # chunks are of 8
    hold_equal(theirs, load_hf(save(theirs, tmp_path)), ids, tolerance)


@pytest.mark.parametrize("seed", range(12))
def test_any_model_of_the_family(tmp_path: Path, seed: int) -> None:
    r = random.Random(seed)
    groups, per_group = r.choice([1, 2, 4]), r.choice([2, 4])
    kv, latent = r.choice([1, 2, 4]), r.choice([None, 8, 40])
    sizes = {
        "num_attention_heads": kv * r.choice([1, 3]),
        "num_key_value_heads": kv,
        "head_dim": r.choice([8, 10]),
        "mamba_num_heads": 4 * r.choice([1, 2, 3]),
        "mamba_head_dim": r.choice([4, 10]),
        "n_groups": r.choice([1, 2, 4]),
        "ssm_state_size": r.randint(1, 20),
        "conv_kernel": r.randint(2, 4),
        "chunk_size": r.choice([1, 3, 16, 64]),
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": (best := r.randint(1, groups)),
        "num_experts_per_tok": r.randint(1, best * per_group),
        "norm_topk_prob": r.random() < 0.7,
        "moe_latent_size": latent,
        "mlp_bias": latent is None and r.random() < 0.3,
        "mlp_hidden_act": r.choice(["relu2", "silu", "gelu"]),
    }
    theirs = oracle("".join(r.choices("ME*-", k=r.randint(1, 6))), seed, **sizes)
    ids = torch.randint(0, 97, (r.randint(1, 3), r.randint(2, 70)))
    hold_equal(theirs, load_hf(save(theirs, tmp_path)), ids, 1e-10)


def hold_equal(theirs: Any, ours: CausalLM, ids: Tensor, tolerance: float) -> None:
    """Logits and the gradients of all parameters."""
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype}
    expected, given = run(theirs, ids), ours(ids)
    assert far(given, expected) < tolerance
    loss(expected, ids).backward()
    loss(given, ids).backward()
    hold_gradients_equal(theirs, ours, tolerance)


def hold_gradients_equal(theirs: Any, ours: CausalLM, tolerance: float) -> None:
    """Gradients of all parameters, by their published names."""
    grads = {name: p.grad for name, p in ours.model.named_parameters()}
    mine = {
        t.key: join(t, grads)
        for t in checkpoint_tensors(ours.model.cfg)
        if "e_score_correction_bias" not in t.key
    }
    known = published(theirs, "grad")
    assert mine.keys() == known.keys()
    # One expert a token, its weight divided by itself: the router's gradient is zero, and noise in both.
    least = 1e-6 * max(float(g.abs().max()) for g in known.values())
    errors = {key: far(mine[key], g, least) for key, g in known.items()}
    assert not {key: e for key, e in errors.items() if not e < tolerance}


def test_packed_documents_are_separate_runs(tmp_path: Path) -> None:
    theirs = oracle("MEM*E-")
    ours = load_hf(save(theirs, tmp_path))
    lengths = (13, 1, 22, 6)
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    documents = ids.split(lengths, dim=1)
    expected, given = [run(theirs, one) for one in documents], ours(ids, Packing.of(lengths))
    assert far(given, torch.cat(expected, dim=1)) < 1e-10
    for logits in (expected, given.split(lengths, dim=1)):
        torch.stack([loss(y, one) for y, one in zip(logits, documents, strict=True)]).sum().backward()
    hold_gradients_equal(theirs, ours, 1e-10)


def test_another_dtype_than_the_file(tmp_path: Path) -> None:
    theirs = oracle("MEM*E-", dtype=torch.float32)
    save(theirs, tmp_path)
    ids = torch.arange(42).view(2, 21)
    exact = run(theirs.double(), ids)
    for dtype, bias, tolerance in (
        (torch.float64, torch.float64, 1e-10),
        (torch.bfloat16, torch.float32, 0.05),
        (torch.float32, torch.float32, 1e-5),
    ):
        ours = load_hf(tmp_path, dtype)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert {b.dtype for n, b in ours.named_buffers() if n.endswith("expert_bias")} == {bias}
        given = ours(ids)
        assert given.dtype == bias  # float32 at least
        assert far(given, exact) < tolerance


def test_published_files_mix_dtypes(tmp_path: Path) -> None:
    """Weights in bfloat16, scan scalars and the selection bias in float32, as training leaves them."""
    theirs = oracle("MEM*E-", dtype=torch.float32)
    for name, param in theirs.named_parameters():
        if not name.endswith(("A_log", ".D", "dt_bias")):
            param.data = param.data.bfloat16()
    ours = load_hf(save(theirs, tmp_path))
    kinds = {name: p.dtype for name, p in ours.model.named_parameters()}
    assert {kinds[n] for n in kinds if ".scalars." in n} == {torch.float32}
    assert {kinds[n] for n in kinds if ".scalars." not in n} == {torch.bfloat16}
    ids = torch.arange(42).view(2, 21)
    given = ours(ids)
    loss(given, ids).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    wide = load_hf(tmp_path, torch.float64)
    assert far(given, wide(ids)) < 0.05
