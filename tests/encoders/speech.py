"""Folders of tiny audio encoders as transformers writes them, from configs drawn at random."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

import tests.llm.oracle  # noqa: F401  makes transformers importable

import transformers  # isort: skip
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3Encoder  # isort: skip
from transformers.models.whisper.modeling_whisper import WhisperEncoder  # isort: skip

FAMILIES = ("whisper", "whisper_whole", "wav2vec2", "hubert", "parakeet", "parakeet_ctc", "audioflamingo3")


def model(family: str, seed: int, *, even: bool = False) -> Any:
    """A model with random sizes and switches; its weights are at no special value.

    even: of heads, widths and layers that two ranks share.
    """
    draw = random.Random(f"{family}/{seed}")
    heads = 2 if even else draw.choice([1, 2, 3, 5])
    mlp = draw.choice([6, 32] if even else [6, 17, 32])
    sizes = {"heads": heads, "width": 2 * heads * draw.choice([2, 4, 5]), "mlp": mlp}
    sizes["layers"] = draw.choice([2, 3] if even else [1, 2, 3])
    torch.manual_seed(seed)
    kinds = {"whisper": whisper, "parakeet": parakeet, "audioflamingo3": flamingo}
    made: Any = kinds.get(family.partition("_")[0], speech)(family, draw, sizes)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p += 0.2 * torch.randn(p.shape)
            if "subsampling" in name and "weight" in name:
                p *= 5.0  # else the first norm sees nearly constant rows, whose gradient is huge
        for name, b in made.named_buffers():
            if name.endswith("running_mean"):
                b.normal_()
            if name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return made.eval()


def whisper(family: str, draw: random.Random, sizes: dict[str, int]) -> Any:
    cfg = transformers.WhisperConfig(
        d_model=sizes["width"],
        encoder_layers=sizes["layers"],
        encoder_attention_heads=sizes["heads"],
        encoder_ffn_dim=sizes["mlp"],
        num_mel_bins=draw.choice([16, 80]),
        max_source_positions=draw.choice([50, 100]),
        scale_embedding=draw.random() < 0.5,
        activation_function=draw.choice(["gelu", "gelu_new"]),
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        vocab_size=30,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    if family == "whisper":
        return WhisperEncoder(cfg)
    return transformers.WhisperForConditionalGeneration(cfg)


def flamingo(family: str, draw: random.Random, sizes: dict[str, int]) -> Any:
    cfg = transformers.AudioFlamingo3EncoderConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp"],
        num_mel_bins=draw.choice([16, 80]),
        max_source_positions=draw.choice([50, 100]),
        activation_function=draw.choice(["gelu", "gelu_new"]),
    )
    return AudioFlamingo3Encoder(cfg)


def speech(family: str, draw: random.Random, sizes: dict[str, int]) -> Any:
    groups = draw.choice([g for g in (1, 2, 4) if sizes["width"] % g == 0])
    n = draw.choice([2, 3])
    options = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["mlp"],
        "conv_dim": [draw.choice([4, 7]) for _ in range(n)],
        "conv_kernel": [10, 3, 2][:n],
        "conv_stride": [5, 4, 2][:n],
        "conv_bias": draw.random() < 0.5,
        "feat_extract_norm": draw.choice(["group", "layer"]),
        "do_stable_layer_norm": draw.random() < 0.5,
        "num_conv_pos_embeddings": draw.choice([5, 8]),
        "num_conv_pos_embedding_groups": groups,
    }
    if family == "hubert":
        options["feat_proj_layer_norm"] = draw.random() < 0.5
        return transformers.HubertModel(transformers.HubertConfig(**options))
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**options))


def parakeet(family: str, draw: random.Random, sizes: dict[str, int]) -> Any:
    cfg = transformers.ParakeetEncoderConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp"],
        num_mel_bins=16,
        subsampling_conv_channels=draw.choice([4, 6]),
        conv_kernel_size=draw.choice([3, 9]),
        attention_bias=draw.random() < 0.5,
        convolution_bias=draw.random() < 0.5,
        scale_input=draw.random() < 0.5,
    )
    if family == "parakeet":
        return transformers.ParakeetEncoder(cfg)
    whole = transformers.ParakeetCTCConfig(encoder_config=cfg.to_dict(), vocab_size=9, pad_token_id=8)
    return transformers.ParakeetForCTC(whole)


def encoder_of(made: Any) -> Any:
    """The encoder in a model."""
    if hasattr(made, "ctc_head"):
        return made.encoder
    return made.model.encoder if hasattr(made, "proj_out") else made


def extractor(made: Any) -> Any:
    """The feature extractor that goes with a model."""
    cfg = encoder_of(made).config
    if hasattr(cfg, "max_source_positions"):
        seconds = cfg.max_source_positions // 50
        return transformers.WhisperFeatureExtractor(feature_size=cfg.num_mel_bins, chunk_length=seconds)
    if hasattr(cfg, "conv_dim"):
        return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return transformers.ParakeetFeatureExtractor(feature_size=cfg.num_mel_bins)


def folder(made: Any, path: Path) -> Path:
    made.save_pretrained(path)
    extractor(made).save_pretrained(path)
    return path
