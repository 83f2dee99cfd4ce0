"""Tiny random models of Nemotron-H in transformers, made from config objects: the oracle of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders import compat
from tests.llm.widened import Widened

# transformers imports both packages, whose native parts a CPU torch cannot load.
compat.torchvision()
compat.torchaudio()

from transformers import NemotronHConfig, NemotronHForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 128,
}


def oracle(
    pattern: str, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any
) -> NemotronHForCausalLM:
    """A random model in which nothing is at a special value that could hide a mistake."""
    torch.manual_seed(seed)
    config = NemotronHConfig(hybrid_override_pattern=pattern, **{**SIZES, **sizes})
    model = NemotronHForCausalLM(config).to(dtype).train()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1 and "A_log" not in name:
                param.add_(0.3 * torch.randn_like(param))
            elif "proj" in name:
                param.mul_(4.0)  # the default deviation makes branches too weak next to the residual
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Far from zero, so that choosing with the bias differs from weighting without it.
                buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel())[torch.randperm(buffer.numel())])
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            # Its mixer clamps time steps at config.time_step_min; published models were trained without.
            module.time_step_limit = (0.0, float("inf"))
    return model


def save(model: nn.Module, path: Path, **kwargs: Any) -> Path:
    """The model in its published format."""
    model.save_pretrained(path, **kwargs)
    return path


def run(model: NemotronHForCausalLM, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocab] in the model's own dtype throughout."""
    if model.dtype == torch.float64:
        with Widened():
            return model(input_ids=ids, use_cache=False).logits
    return model(input_ids=ids, use_cache=False).logits
