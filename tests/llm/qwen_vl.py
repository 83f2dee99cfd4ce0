"""Tiny random vision-language models of Qwen in transformers, whole: the oracles of ours."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import tests.llm.oracle  # noqa: F401  makes transformers importable
from tests.llm.widened import Widened

import transformers  # isort: skip

NAMES = ("qwen2_5_vl", "qwen3_vl")
CLASSES = {
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}
IMAGE, VIDEO, BEGIN, END = 90, 91, 92, 93  # ids of placeholders, and of the markers around a picture
PATCH, MERGE = 4, 2
TOWER = {"depth": 3, "hidden_size": 24, "intermediate_size": 36, "num_heads": 3, "patch_size": PATCH}
TOWERS = {
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
}


def options(name: str, seed: int) -> dict[str, Any]:
    """Options of a random model: sizes, sections of axes, ties."""
    r = random.Random(seed)
    n, kv = r.choice([(4, 2), (2, 1), (2, 2)])
    dim = r.choice([8, 12]) if name == "qwen3_vl" else 8
    cuts = sorted(r.choices(range(dim // 2 + 1), k=2))
    rope = {
        "rope_type": "default",
        "rope_theta": r.choice([1e4, 5e5]),
        "mrope_section": [cuts[0], cuts[1] - cuts[0], dim // 2 - cuts[1]],
    }
    text = {
        "vocab_size": 96,
        "hidden_size": 8 * n,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": n,
        "num_key_value_heads": kv,
        "max_position_embeddings": 256,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if name == "qwen3_vl":
        text |= {"head_dim": dim, "attention_bias": r.random() < 0.5}
        text["rope_parameters"] |= {"mrope_interleaved": True}
    return {
        "text_config": text,
        "vision_config": {**TOWER, **TOWERS[name], "out_hidden_size": 8 * n},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": BEGIN,
        "vision_end_token_id": END,
        "tie_word_embeddings": r.random() < 0.5,
    }


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model in which nothing is at a special value that could hide a mistake."""
    torch.manual_seed(seed)
    config, model_class = CLASSES[name]
    with Widened() if dtype == torch.float64 else nullcontext():
        model = model_class._from_config(
            config(**{**options(name, seed), **changes}), attn_implementation="eager", dtype=dtype
        )
    with torch.no_grad():
        for key, p in model.named_parameters():
            # A strong embedding would repeat the last token, whatever attention adds.
            wide = 0.05 if "embed_tokens" in key else 0.25
            p.copy_(wide * torch.randn(p.shape, dtype=dtype) + (0.7 if p.ndim == 1 else 0.0))
    model.tie_weights()
    return model.eval()


def text_folder(model: Any, folder: Path) -> Path:
    """The language model alone, as a folder of the plain family."""
    text = model.config.text_config.to_dict()
    family = text.pop("model_type").split("_")[0]
    folder.mkdir(parents=True)
    config = transformers.AutoConfig.for_model(family, **text)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    config.save_pretrained(folder)
    held = {f"model.{k}": t for k, t in model.model.language_model.state_dict().items()}
    if not config.tie_word_embeddings:
        held["lm_head.weight"] = model.lm_head.weight.detach()
    save_file({k: t.contiguous() for k, t in held.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def prompt(seed: int, pieces: int = 4) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Ids [1, n] of texts and pictures between markers, their kinds, and each picture's size in patches."""
    r = random.Random(seed)
    ids: list[int] = []
    sizes = []
    for _ in range(pieces):
        ids += [r.randrange(80) for _ in range(r.randint(1, 5))]
        if r.random() < 0.7:
            size = (MERGE * r.randint(1, 4), MERGE * r.randint(1, 4))
            ids += [BEGIN, *[IMAGE] * (size[0] * size[1] // MERGE**2), END]
            sizes.append(size)
    ids += [r.randrange(80) for _ in range(r.randint(1, 5))]
    found = torch.tensor([ids])
    return found, (found == IMAGE).int(), sizes


def inputs(seed: int, pieces: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What transformers' forward takes of prompt(); its pictures are random patches."""
    ids, kinds, sizes = prompt(seed, pieces)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    if sizes:
        grid = torch.tensor([[1, *size] for size in sizes])
        gen = torch.Generator().manual_seed(seed)
        values = torch.randn(int(grid.prod(1).sum()), 6 * PATCH**2, generator=gen, dtype=dtype)
        out |= {"pixel_values": values, "image_grid_thw": grid}
    return out


def runs(ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """A prompt as grid_positions() takes it."""
    from parallel.sequence.grid import RowGrid

    left, out, at = list(sizes), [], 0
    while at < len(ids):
        if ids[at] != IMAGE:
            out.append(1)
            at += 1
        else:
            down, across = (n // MERGE for n in left.pop(0))
            out.append(RowGrid(1, down, across))
            at += down * across
    return out
