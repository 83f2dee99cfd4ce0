"""Low-rank adapters as folders of the peft package: written, for the published model, and read.

adapter_config.json says rank, alpha and the linear maps; adapter_model.safetensors holds A and B of each
under the name that the map has in transformers' class: base_model.model.NAME.lora_A.weight.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.config import export_family
from llm.hf.family import Family
from llm.hf.stored import Stored
from llm.hf.weights import model_tensors
from llm.model import LLM
from parallel.published import FileTensor, SafeFolder, module_shapes, new_folder
from parallel.published.tables import Part, parts_by_name
from parallel.sharding.low_rank import A, B, LowRank, adapters_of, add_adapters, is_adapter

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
    maps = {name: _map_of(name, held[name][0][0], chosen) for name in names}
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


class AdapterFolder(SafeFolder):
    """The tensors of a folder of peft, read by slices."""

    def _layout(self) -> dict[str, list[str] | None]:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path} has no {name}; needed: a folder that peft has saved")
        return {ADAPTER_WEIGHTS: None}

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        try:
            found = json.loads((self.path / ADAPTER_CONFIG).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path / ADAPTER_CONFIG} is unreadable: {error}") from error
        return dict(found)


def adapter_tensors(cfg: LLMConfig, low: LowRank, folder: AdapterFolder) -> list[FileTensor]:
    """The tensors of a folder that hold the adapters of a language model.

    low: the adapters that the model has. Raises ValueError where the folder's are of another rank, scale or
    kind, or on other maps, and says what would fit.
    """
    _check_kind(folder.config(), low, folder.path)
    model = LLM(cfg, device="meta")
    add_adapters(model, low)
    shapes = {name: shape for name, shape in module_shapes(model).items() if is_adapter(name)}
    family = export_family(cfg)
    weights = {t.key.removesuffix(".weight"): t for t in model_tensors(cfg, family)[0]}
    tensors, unknown = [], []
    for key, shape in folder.shapes().items():
        found = KEY.fullmatch(key)
        tensor = weights.get(found[1]) if found else None
        if found is None or tensor is None:
            unknown.append(key)
            continue
        _map_of(tensor.parts[0].name, tensor, family)  # refuses a part of a larger tensor
        name = adapters_of(tensor.parts[0].name)["AB".index(found[2])]
        tensors.append(FileTensor(key, shape, (Part(name),)))
    if unknown:
        raise ValueError(f"{folder.path} has {sorted(unknown)[0]}, no adapter of a map of {family.title}")
    there = {t.parts[0].name for t in tensors}
    if there != shapes.keys():
        fitting = sorted({_ending(name) for name in there})
        raise ValueError(
            f"{folder.path} has {len(there) // 2} adapters and the model {len(shapes) // 2}, different in "
            f"{sorted(there ^ shapes.keys())[0]}; needed: the same maps, such as targets: {fitting}"
        )
    for t in tensors:
        if t.shape != shapes[t.parts[0].name]:
            expected = list(shapes[t.parts[0].name])
            raise ValueError(f"{folder.path}: {t.key} has shape {list(t.shape)}, expected {expected}")
    return tensors


KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What a folder of peft may ask for and adapters here are not: by field, what it must be where it is there.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, [], {}),
}


def _check_kind(said: Mapping[str, Any], low: LowRank, path: Path) -> None:
    for field, able in PLAIN.items():
        if said.get(field, able[0]) not in able:
            raise ValueError(f"{path} has {field}={said[field]!r}; needed: {able[0]!r}")
    rank, alpha = said.get("r", 8), float(said.get("lora_alpha", 8))
    if said.get("use_rslora"):
        alpha *= math.sqrt(rank)  # it divides by the root of the rank
    if (rank, alpha) != (low.rank, low.alpha):
        raise ValueError(
            f"{path} has adapters of rank {rank} and alpha {alpha:g}, the model of rank {low.rank} and alpha "
            f"{low.alpha:g}; needed: rank: {rank}, alpha: {alpha:g}"
        )


def _ending(adapter: str) -> str:
    """The shortest target that an adapter's map fits, in all layers."""
    return adapter.removesuffix(A).removesuffix(B).removesuffix(".weight").rpartition(".")[2]


def _map_of(name: str, tensor: FileTensor, family: Family) -> str:
    """The name of the linear map in transformers' class that the weight `name` is."""
    if len(tensor.parts) > 1:
        others = ", ".join(p.name.rpartition(".mixer.")[2] for p in tensor.parts)
        raise ValueError(
            f"{tensor.key} of {family.title} holds {others} in one tensor, and {name} has adapters of its "
            "own, which one pair A, B of the whole is not; needed: checkpoint export without --adapters, "
            "which merges them, or train.lora.llm.targets without these"
        )
    return tensor.key.removesuffix(".weight")
