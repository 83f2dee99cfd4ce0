"""Whole models that transformers makes, small and random: their logits and gradients, and ours."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from encoders.hf.processor import dense_batch
from encoders.module import EncoderModule
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from mm.checkpoint.whole import read_whole
from mm.containers.registry import fitting
from mm.containers.write import files_of
from mm.plan.blueprint import Blueprint
from mm.plan.whole import whole_of
from parallel.published import join
from parallel.sequence.packed import Packing
from parallel.tensor_parallel.loss import logits
from tests.encoders.published import MODELS
from tests.llm.families import build, config_of, options, prepare
from tests.llm.widened import Widened
from tests.mm.data.tokenizers_made import byte_bpe, write_tokenizer

import transformers  # isort: skip

IMAGE, AUDIO = 5, 6  # ids of <image> and <audio> in the tokenizer
PREFIX = {"siglip": 0, "dinov2_registers": 3, "dinov3": 3, "dinov3_gated": 2, "radio": 5}  # else 1
TOWERS = [
    *("clip", "siglip", "image_vit", "dinov2", "dinov2_giant", "dinov2_registers", "dinov3", "dinov3_gated"),
    "radio",
]


def randomized(model: Any, seed: int) -> Any:
    """Nothing at a special value that could hide a mistake, in float64, without what only training has."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data.double()
            noise = 0.2 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
            p.copy_(p + noise if p.ndim == 1 else p * 2)
    return prepare(model.eval())


def language(family: str, seed: int) -> Any:
    """The config of a random language model of a family, of the tokenizer's size."""
    return config_of(family, {**options(family, seed), "vocab_size": 448})


def llava(tower: str, family: str, seed: int) -> Any:
    """A Llava, its layer and strategy drawn."""
    r = random.Random(seed)
    _, config, fixed = MODELS[tower]
    prefix = PREFIX.get(tower, 1)
    cfg = transformers.LlavaConfig(
        vision_config=config(**fixed),
        text_config=language(family, seed),
        vision_feature_layer=r.choice([-1, -2, 1]),
        vision_feature_select_strategy=r.choice(["default", "full"]) if prefix == 1 else "full",
        projector_hidden_act=r.choice(["gelu", "gelu_pytorch_tanh", "relu2", "silu"]),
        multimodal_projector_bias=r.random() < 0.7,
        image_token_index=IMAGE,
    )
    return randomized(_built(transformers.LlavaForConditionalGeneration, cfg), seed)


def _built(kind: Any, cfg: Any) -> Any:
    """A model whose language model works out rotary angles in float64, as its own tests have it."""
    made = kind._from_config(cfg)  # its towers with sdpa: eager attention of some is float32
    text = build(cfg.text_config)
    getattr(made, "model", made).language_model = getattr(text, text.base_model_prefix)
    made.tie_weights()
    return made


def asked_of(model: Any, ids: Tensor, features: Mapping[str, Any]) -> Tensor:
    """Logits [length, vocab] of ids with the encoders' outputs, in float64 throughout. features: by kind."""
    with Widened():
        found: Tensor = model(input_ids=ids, mm_encoder_outputs=dict(features), use_cache=False).logits[0]
    return found


def saved(model: nn.Module, folder: Path) -> Path:
    """The model in its published format, with a tokenizer."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return write_tokenizer(folder, byte_bpe())


def ours(folder: Path) -> tuple[Blueprint, dict[str, nn.Module]]:
    """What is read of a folder, to train."""
    blueprint, modules = read_whole(folder)
    for module in modules.values():
        module.requires_grad_(True)
    return blueprint, modules


def logits_of(
    modules: Mapping[str, nn.Module], ids: Tensor, rows: Mapping[str, tuple[int, Tensor]]
) -> Tensor:
    """Logits [length, vocab] of ids [1, length] here; rows: by module, its token's id and the rows."""
    llm, n = modules["llm"], ids.numel()
    assert isinstance(llm, LLM)
    packing = Packing.of([n])
    places = {m: torch.nonzero(ids[0] == i)[:, 0] for m, (i, _) in rows.items()}
    text = LLMBatch(ids[0], ids[0], packing, n, places)
    states = llm.states(text, {m: r for m, (_, r) in rows.items()}, ForwardContext(packing, n))
    return logits(states, llm.head_weight(), llm.cfg.logit_scale, llm.cfg.logit_cap)


def picture_rows(module: nn.Module, pixels: Tensor) -> Tensor:
    """Rows of pictures as a processor gives them."""
    assert isinstance(module, EncoderModule)
    cfg = module.cfg
    if type(module.encoder).__name__ == "Radio":  # whose class normalises them itself
        mean, std = (torch.tensor(x) for x in (cfg.pictures.mean, cfg.pictures.std))
        pixels = ((pixels.float() - mean[:, None, None]) / std[:, None, None]).to(pixels.dtype)
    found = module(dense_batch(cfg, pixels))
    values: Tensor = found.values
    return values


def asked(n: int, token: int) -> Tensor:
    """Ids of a prompt with n rows in it."""
    return torch.tensor([[40, 41, 42, *([token] * n), 43, 44, 45, 46]])


def their_gradients(model: Any, folder: Path) -> dict[str, Tensor]:
    """Under published names: saved as weights are, by transformers' own code."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    model.save_pretrained(folder)
    return named(load_file(folder / "model.safetensors"))


def our_gradients(blueprint: Blueprint, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Under the names that ours are exported under."""
    whole = whole_of(blueprint)
    container, _ = fitting(whole)
    assert container is not None
    tensors = files_of(container, whole, dict.fromkeys(whole.towers, (0, ""))).contents.tensors
    grads = {
        f"{m}.{n}": torch.zeros_like(p) if p.grad is None else p.grad
        for m, module in modules.items()
        for n, p in module.named_parameters()
    }
    return named({t.key: join(t, grads) for t in tensors if all(part.name in grads for part in t.parts)})


def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under keys without what published folders of CLIP and SigLIP have inside."""
    return {key.replace("vision_tower.vision_model.", "vision_tower."): t for key, t in tensors.items()}


def far(mine: Tensor, theirs: Tensor, least: float = 1e-30) -> float:
    """Largest difference, relative to the largest element, or to `least`."""
    return float((mine - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=least))


def hold_gradients(mine: Mapping[str, Tensor], known: Mapping[str, Tensor], tolerance: float) -> None:
    """Gradients alike; of what ours lacks, theirs are zero."""
    least = 1e-6 * max(float(g.abs().max()) for g in known.values())
    wrong = {key: far(mine[key], known[key].double(), least) for key in mine}
    # RADIO rounds the gradient of its table to float32.
    bad = {k: e for k, e in wrong.items() if not e < (1e-6 if k.endswith("pos_embed") else tolerance)}
    assert not bad, bad
    rest = [known[key] for key in known.keys() - mine.keys() if "correction_bias" not in key]
    assert not any(g.any() for g in rest if g.is_floating_point() and g.ndim and g.shape[-1] > 1)


__all__ = ["Widened"]
