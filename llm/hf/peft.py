"""Writes low-rank adapters as a folder that the peft package loads onto the published model.

adapter_config.json says rank, alpha and the linear maps; adapter_model.safetensors holds A and B of each
under the name that the map has in transformers' class: base_model.model.NAME.lora_A.weight.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.config import export_family
from llm.hf.stored import Stored
from llm.hf.weights import model_tensors
from parallel.published import FileTensor, new_folder
from parallel.published.tables import parts_by_name
from parallel.sharding.low_rank import LowRank, adapters_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft needs to know and every adapter here has in common.
COMMON: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
}


def write_adapters(
    source: Stored,
    cfg: LLMConfig,
    path: Path,
    low: LowRank,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
) -> Path:
    """Write the adapters of a checkpoint's language model to the new folder `path`.

    low: their rank and alpha. base: the folder of the weights below them, None where it is not known. dtype:
    of the tensors, None for their own. family: see llm.hf.config.export_family(). Raises ValueError where
    there are none, where the routing bias moved in training, and where a map with adapters is part of a
    larger tensor in the family's files: A of one part is not A of the whole.
    """
    partial = new_folder(path)
    if "E" in cfg.kinds and cfg.expert_bias_rate:
        raise ValueError(
            f"expert_bias_rate={cfg.expert_bias_rate}, so the bias that experts are selected with moved in "
            "training, which no adapter holds; needed: model.llm.expert_bias_rate=0 in the run, or "
            "checkpoint export without --adapters"
        )
    chosen = export_family(cfg, family)
    held = parts_by_name(model_tensors(cfg, chosen)[0])
    names = [name for name in held if source.adapted(name)]
    if not names:
        raise ValueError(f"{source.path} has no adapters of the language model; needed: train.lora.llm")
    maps = {name: _map_of(name, held[name][0][0], chosen.title) for name in names}
    tensors: dict[str, Tensor] = {}
    for name, there in maps.items():
        found = source.fetch(adapters_of(name))
        for letter, ours in zip("AB", adapters_of(name), strict=True):
            value = found[ours] if dtype is None else found[ours].to(dtype)
            tensors[f"base_model.model.{there}.lora_{letter}.weight"] = value.contiguous()
    own = {"base_model_name_or_path": base, "r": low.rank, "lora_alpha": low.alpha}
    partial.mkdir(parents=True)
    config = {**COMMON, **own, "target_modules": sorted(maps.values())}
    (partial / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    os.replace(partial, path)
    return path


def _map_of(name: str, tensor: FileTensor, title: str) -> str:
    """The name of the linear map in transformers' class that the weight `name` is."""
    if len(tensor.parts) > 1:
        others = ", ".join(p.name.rpartition(".mixer.")[2] for p in tensor.parts)
        raise ValueError(
            f"{tensor.key} of {title} holds {others} in one tensor, and {name} has adapters of its own, "
            "which one pair A, B of the whole is not; needed: checkpoint export without --adapters, which "
            "merges them, or train.lora.llm.targets without these"
        )
    return tensor.key.removesuffix(".weight")
