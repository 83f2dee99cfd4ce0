"""Tiny random models of every family in transformers, made from config objects: the oracles of ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.llm.oracle  # noqa: F401  makes transformers importable
from tests.llm.widened import Widened

import transformers  # isort: skip

Options = dict[str, Any]

SIZES: Options = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(r: random.Random) -> Options:
    heads, kv = r.choice([(4, 2), (3, 1), (3, 3), (6, 2)])
    return {
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": r.choice([8, 6, 10]),
        "attention_bias": r.random() < 0.5,
        "mlp_bias": r.random() < 0.5,
        "tie_word_embeddings": r.random() < 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": r.choice([1e4, 5e5])},
    }


def mixtral(r: random.Random) -> Options:
    n = r.choice([2, 5, 8])
    return {"head_dim": r.choice([None, 6]), "num_local_experts": n, "num_experts_per_tok": r.randint(1, n)}


# By model_type: random options beyond SIZES, in which every switch of the family appears.
RANDOM: dict[str, Callable[[random.Random], Options]] = {"llama": llama, "mixtral": mixtral}


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A random model of a family, in which nothing is at a special value that could hide a mistake.

    options: of its config, over the random ones of `seed`. In float64 its rotary angles are too; transformers
    has them in float32, whatever the model is converted to.
    """
    torch.manual_seed(seed)
    given = SIZES | RANDOM[name](random.Random(seed)) | options
    config = transformers.AutoConfig.for_model(name, **given, attn_implementation="eager")
    if dtype == torch.float64:
        with Widened():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for n, param in model.named_parameters():
            if param.ndim == 1 and "A_log" not in n:
                param.add_(0.3 * torch.randn_like(param))
            else:
                param.mul_(4.0)  # the default deviation makes branches too weak next to the residual
    return model.train()


def save(model: nn.Module, path: Path, **options: Any) -> Path:
    """The model in its published format."""
    model.save_pretrained(path, **options)
    return path


def run(model: Any, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocab] in the model's own dtype throughout."""
    if model.dtype == torch.float64:
        with Widened():
            return model(input_ids=ids, use_cache=False).logits
    return model(input_ids=ids, use_cache=False).logits


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed cross entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def ids_of(vocab: int = 96, length: int = 21) -> Tensor:
    """Two sequences of tokens; 21 is no multiple of a chunk of the scan."""
    return torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(1))
