"""What folders of published audio encoders say of them."""

from __future__ import annotations

from typing import Any

from encoders.audio.parakeet import ParakeetConfig
from encoders.audio.wav2vec2 import Wav2Vec2Config
from encoders.audio.whisper import WhisperConfig
from encoders.hf.audio import WAV2VEC2_SIZES
from encoders.hf.saying import Names, Rest, Said, named
from encoders.hf.vision import ACTIVATIONS

WHISPER: Names = {
    "width": ("d_model", None),
    "heads": ("encoder_attention_heads", None),
    "layers": ("encoder_layers", None),
    "mlp": ("encoder_ffn_dim", None),
    "positions": ("max_source_positions", None),
}
FLAMINGO: Names = {
    "width": ("hidden_size", None),
    "heads": ("num_attention_heads", None),
    "layers": ("num_hidden_layers", None),
    "mlp": ("intermediate_size", None),
    "positions": ("max_source_positions", None),
}
PARAKEET: Names = {
    **{k: v for k, v in FLAMINGO.items() if k in ("width", "heads", "layers")},
    "ffn": ("intermediate_size", None),
    "kernel": ("conv_kernel_size", None),
    "channels": ("subsampling_conv_channels", None),
    "bias": ("attention_bias", None),
    "conv_bias": ("convolution_bias", None),
    "scaled": ("scale_input", None),
}


def whisper(cfg: WhisperConfig) -> dict[str, Any]:
    return {"model_type": "whisper", **named(cfg, WHISPER), **_frames(cfg)}


def flamingo(cfg: WhisperConfig) -> dict[str, Any]:
    return {"model_type": "audioflamingo3_encoder", **named(cfg, FLAMINGO), **_frames(cfg)}


def _frames(cfg: WhisperConfig) -> dict[str, Any]:
    return {"num_mel_bins": cfg.sound.mels, "activation_function": _activation(cfg.activation)}


def _activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def whisper_extractor(cfg: WhisperConfig) -> dict[str, Any]:
    sound = cfg.sound
    samples = round(sound.seconds * sound.rate)
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": sound.mels,
        "sampling_rate": sound.rate,
        "hop_length": sound.hop,
        "n_fft": sound.size,
        "chunk_length": round(sound.seconds),
        "n_samples": samples,
        "nb_max_frames": samples // sound.hop,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def parakeet(cfg: ParakeetConfig) -> dict[str, Any]:
    return {
        "model_type": "parakeet_encoder",
        **named(cfg, PARAKEET),
        "num_key_value_heads": cfg.heads,
        "hidden_act": "silu",
        "subsampling_factor": 8,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "num_mel_bins": cfg.sound.mels,
    }


def parakeet_extractor(cfg: ParakeetConfig) -> dict[str, Any]:
    return {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": cfg.sound.mels,
        "sampling_rate": cfg.sound.rate,
        "hop_length": cfg.sound.hop,
        "n_fft": cfg.sound.size,
        "win_length": cfg.sound.window,
        "preemphasis": cfg.sound.emphasis,
        "padding_value": 0.0,
    }


def batches(cfg: ParakeetConfig) -> Rest:
    """How many batches each norm has seen, which nothing depends on."""
    return {f"layers.{n}.conv.norm.num_batches_tracked": ((), 0) for n in range(cfg.layers)}


def wav2vec2(cfg: Wav2Vec2Config) -> dict[str, Any]:
    """Of wav2vec 2.0 or HuBERT, as the options say."""
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in named(cfg, WAV2VEC2_SIZES).items()}
    own = {"feat_proj_layer_norm": cfg.input_norm} if cfg.model_type == "hubert" else {}
    return {
        "model_type": cfg.model_type,
        **sizes,
        **own,
        "num_feat_extract_layers": len(cfg.channels),
        "hidden_act": _activation(cfg.activation),
        "feat_extract_activation": "gelu",
    }


def wav2vec2_extractor(cfg: Wav2Vec2Config) -> dict[str, Any]:
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": cfg.sound.rate,
        "do_normalize": cfg.sound.unit,
        "padding_value": 0.0,
        # With a group norm the models were trained without a mask.
        "return_attention_mask": cfg.conv_norm == "layer",
    }


def masked(cfg: Wav2Vec2Config) -> Rest:
    """What stands for masked spans in transformers' training, which ours does not mask."""
    return {"masked_spec_embed": ((cfg.width,), 0.0)}


SOUND: dict[str, Said] = {
    "whisper": Said(whisper, whisper_extractor),
    "audioflamingo3": Said(flamingo, whisper_extractor),
    "wav2vec2": Said(wav2vec2, wav2vec2_extractor, masked),
    "parakeet": Said(parakeet, parakeet_extractor, batches),
}
