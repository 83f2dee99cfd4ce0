"""Folders of tiny transformers models with random weights, as save_pretrained() writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tests.llm.oracle  # noqa: F401  makes transformers importable

import transformers  # isort: skip
from transformers.models.whisper.modeling_whisper import WhisperEncoder  # isort: skip

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {**SIZES, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
SPEECH: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def model(name: str) -> Any:
    """A model of the class `name` with tiny sizes."""
    if name == "CLIPModel":
        text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 99}
        cfg = transformers.CLIPConfig(text_config=text, vision_config=VISION)
        return transformers.CLIPModel(cfg)
    if name.startswith("Whisper"):
        cls = WhisperEncoder if name == "WhisperEncoder" else getattr(transformers, name)
        return cls(transformers.WhisperConfig(**WHISPER))
    options = {
        "ConvNextModel": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
        "Wav2Vec2Model": SPEECH,
        "WavLMModel": SPEECH,
    }.get(name, VISION)
    stem = name.removesuffix("Model").removesuffix("ForImageClassification")
    return getattr(transformers, name)(getattr(transformers, f"{stem}Config")(**options))


def inputs(name: str) -> Any:
    """The processor that goes with it."""
    if name == "PixtralVisionModel":
        patch = {"height": 8, "width": 8}
        return transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=patch)
    if name.startswith("Whisper"):
        return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    if name in ("Wav2Vec2Model", "WavLMModel"):
        masked = name == "WavLMModel"
        return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32})


def folder(name: str, path: Path, seed: int = 0) -> Path:
    """A folder of such a model and its processor."""
    torch.manual_seed(seed)
    made = model(name)
    with torch.no_grad():
        for p in made.parameters():  # nothing is at a special value that could hide a mistake
            p += 0.05 * torch.randn(p.shape)
    made.save_pretrained(path)
    inputs(name).save_pretrained(path)
    return path
