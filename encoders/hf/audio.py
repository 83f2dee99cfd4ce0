"""Published audio families: their config.json, their tensors, their feature extractors' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from encoders.audio import flamingo  # noqa: F401  registers its encoder
from encoders.audio.parakeet import Parakeet
from encoders.audio.wav2vec2 import Wav2Vec2
from encoders.audio.whisper import Whisper
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.hf.family import Family, Part, Rows
from encoders.hf.maps import Pairs, blocks, both, row_parallel, rows, separate
from encoders.hf.vision import activation, fields
from parallel.published import Row

FREE = ("sound", "layers")
# What a folder without the settings of a feature extractor has: those of transformers.
EXTRACTOR = {"rate": ("sampling_rate", 16000), "mels": ("feature_size", 80), "hop": ("hop_length", 160)}


def needed(part: Part, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where a field of config.json has another value than ours can be."""
    for name, value in wanted.items():
        if part.field(name, value) != value:
            raise ValueError(f"config.json has {name}={part.field(name, value)!r}; needed: {value!r}")


def sound(part: Part, names: Mapping[str, tuple[str, Any]], **more: Any) -> dict[str, Any]:
    """Settings of the feature extractor, over those of the options' default. names: by setting of ours."""
    given = {ours: part.processor.get(theirs, default) for ours, (theirs, default) in names.items()}
    return {**given, **more}


def stacked(encoder: Encoder, values: Tensor, lengths: list[int], metas: list[Meta]) -> Tensor:
    """Features [n, most rows, width] of padded inputs [n, most inputs, ..], zero after a clip's rows."""
    packed = torch.cat([x[:n] for x, n in zip(values, lengths, strict=True)]) if lengths else values[:0]
    found = encoder(ItemBatch(packed, tuple(lengths), tuple(metas)))
    assert isinstance(found, Features)
    return torch.nn.utils.rnn.pad_sequence(
        list(torch.split(found.values, list(found.rows))), batch_first=True
    )


def real(inputs: Mapping[str, Any], values: Tensor) -> list[int]:
    """Inputs of each clip that are no padding. values: [n, most inputs, ..]."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return [values.shape[1]] * len(values)
    counts: list[int] = mask.sum(-1).tolist()
    return counts


def whisper_options(part: Part) -> dict[str, Any]:
    names = {"heads": ("encoder_attention_heads", 6), "layers": ("encoder_layers", 4)}
    sizes = {"width": ("d_model", 384), "mlp": ("encoder_ffn_dim", 1536)}
    return {
        **fields(part, {**names, **sizes}),
        **whisper_sound(part, mels=80),
    }


def whisper_sound(part: Part, mels: int) -> dict[str, Any]:
    """What Whisper's towers have beside sizes; mels: of files without them. Clips are as long as there are
    positions for, one for two frames."""
    positions = part.field("max_source_positions", 1500)
    made = sound(part, {k: EXTRACTOR[k] for k in ("rate", "hop")}, mels=part.field("num_mel_bins", mels))
    size = part.processor.get("n_fft", 400)
    seconds = 2.0 * positions * made["hop"] / made["rate"]
    return {
        "activation": activation(part, "gelu", "activation_function"),
        "positions": positions,
        "sound": {**made, "size": size, "window": size, "seconds": seconds},
    }


WHISPER_BLOCK = [
    *both("self_attn_layer_norm", "norm1"),
    *separate([f"self_attn.{n}_proj" for n in "qkv"]),  # keys have no bias
    *row_parallel("self_attn.out_proj", "attention.out"),
    *both("final_layer_norm", "norm2"),
    *both("fc1", "mlp.up"),
    *row_parallel("fc2", "mlp.down"),
]


def whisper_rows(cfg: Any) -> Rows:
    stem: Pairs = [(f"{c}.weight", (c,)) for c in ("conv1", "conv2")]
    stem += [(f"{c}.bias", (f"{c}_bias",)) for c in ("conv1", "conv2")]
    stem += [("embed_positions.weight", ("position",)), *both("layer_norm", "norm")]
    return [*rows(stem), *blocks(WHISPER_BLOCK, cfg.layers, "layers.{n}.")]


def whisper_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, positions, width] of input_features [n, mels, frames]."""
    values = inputs["input_features"].transpose(1, 2)
    assert isinstance(encoder, Whisper)
    frames = 2 * encoder.cfg.positions
    if values.shape[1] != frames:
        raise ValueError(f"input_features have {values.shape[1]} frames; needed: {frames}, as it pads them")
    return stacked(encoder, values, [frames] * len(values), [{"frames": frames}] * len(values))


WHISPER = Family(
    encoder="whisper",
    model_types=("whisper",),
    probe="conv1.weight",
    options=whisper_options,
    rows=whisper_rows,
    unused=(),
    features=whisper_features,
    free=FREE,
)


WAV2VEC2_SIZES: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "layers": ("num_hidden_layers", 12),
    "mlp": ("intermediate_size", 3072),
    "eps": ("layer_norm_eps", 1e-5),
    "channels": ("conv_dim", [512] * 7),
    "kernels": ("conv_kernel", [10, 3, 3, 3, 3, 2, 2]),
    "strides": ("conv_stride", [5, 2, 2, 2, 2, 2, 2]),
    "conv_bias": ("conv_bias", False),
    "conv_norm": ("feat_extract_norm", "group"),
    "reach": ("num_conv_pos_embeddings", 128),
    "groups": ("num_conv_pos_embedding_groups", 16),
    "norm_first": ("do_stable_layer_norm", False),
}


def wav2vec2_options(part: Part) -> dict[str, Any]:
    needed(part, {"add_adapter": False, "adapter_attn_dim": None, "conv_pos_batch_norm": False})
    kind = part.config["model_type"]
    if activation(part, "gelu", "feat_extract_activation") != "gelu":
        raise ValueError("config.json has a feat_extract_activation other than gelu; needed: gelu")
    return {
        **fields(part, WAV2VEC2_SIZES),
        "activation": activation(part, "gelu"),
        # wav2vec 2.0's class heeds no such field.
        "input_norm": kind != "hubert" or part.field("feat_proj_layer_norm", True),
        "sound": sound(part, {"rate": EXTRACTOR["rate"], "unit": ("do_normalize", True)}),
        "model_type": kind,
    }


WAV2VEC2_BLOCK = [
    *separate([f"attention.{n}_proj" for n in "qkv"]),
    *row_parallel("attention.out_proj", "attention.out"),
    *both("layer_norm", "norm1"),
    *both("feed_forward.intermediate_dense", "mlp.up"),
    *row_parallel("feed_forward.output_dense", "mlp.down"),
    *both("final_layer_norm", "norm2"),
]


def wav2vec2_rows(cfg: Any) -> Rows:
    stem: Pairs = []
    for i in range(len(cfg.channels)):
        at = f"feature_extractor.conv_layers.{i}."
        stem += [(f"{at}conv.weight", (f"conv{i}",)), (f"{at}conv.bias", (f"conv{i}_bias",))]
        stem += [
            (f"{at}layer_norm.weight", (f"conv{i}_norm",)),
            (f"{at}layer_norm.bias", (f"conv{i}_shift",)),
        ]
    near = "encoder.pos_conv_embed.conv."
    stem += both("feature_projection.layer_norm", "input_norm") + both(
        "feature_projection.projection", "input"
    )
    stem += [
        (f"{near}weight_g", ("near_length",)),
        (f"{near}weight_v", ("near",)),
        (f"{near}bias", ("near_bias",)),
    ]
    stem += both("encoder.layer_norm", "norm" if cfg.norm_first else "first_norm")
    return [*rows(stem), *blocks(WAV2VEC2_BLOCK, cfg.layers, "encoder.layers.{n}.")]


def wav2vec2_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, rows, width] of input_values [n, samples], each clip as if it were alone."""
    values = inputs["input_values"]
    assert isinstance(encoder, Wav2Vec2)
    lengths, rate = real(inputs, values), encoder.cfg.sound.rate
    return stacked(encoder, values, lengths, [{"samples": n, "rate": rate} for n in lengths])


WAV2VEC2 = Family(
    encoder="wav2vec2",
    model_types=("wav2vec2", "hubert"),
    probe="feature_extractor.conv_layers.0.conv.weight",
    options=wav2vec2_options,
    rows=wav2vec2_rows,
    unused=("masked_spec_embed",),
    features=wav2vec2_features,
    free=FREE,
    spellings=(
        (r"parametrizations\.weight\.original0$", "weight_g"),
        (r"parametrizations\.weight\.original1$", "weight_v"),
    ),
)


def parakeet_options(part: Part) -> dict[str, Any]:
    # Nemotron Omni's folders do not say that theirs is without.
    inside = "downsample_ratio" in part.whole
    needed(
        part,
        {
            "subsampling_factor": 8,
            "subsampling_conv_kernel_size": 3,
            "subsampling_conv_stride": 2,
            "hidden_act": "silu",
            "num_key_value_heads": part.field("num_attention_heads", 8),
        },
    )
    names = {
        "width": ("hidden_size", 1024),
        "heads": ("num_attention_heads", 8),
        "layers": ("num_hidden_layers", 24),
        "ffn": ("intermediate_size", 4096),
        "kernel": ("conv_kernel_size", 9),
        "channels": ("subsampling_conv_channels", 256),
        "bias": ("attention_bias", not inside),
        "conv_bias": ("convolution_bias", True),
        "scaled": ("scale_input", not inside),
    }
    extractor = {
        **{k: EXTRACTOR[k] for k in ("rate", "hop")},
        "size": ("n_fft", 512),
        "window": ("win_length", 400),
        "emphasis": ("preemphasis", 0.97),
    }
    return {**fields(part, names), "sound": sound(part, extractor, mels=part.field("num_mel_bins", 80))}


def parakeet_block() -> list[Row]:
    """The rows of a block, less their prefixes."""
    plain: Pairs = []
    for theirs, ours in (
        ("norm_feed_forward1", "norm_ff1"),
        ("norm_self_att", "norm_att"),
        ("norm_conv", "norm_conv"),
        ("norm_feed_forward2", "norm_ff2"),
        ("norm_out", "norm_out"),
        ("feed_forward1.linear1", "ff1.up"),
        ("feed_forward2.linear1", "ff2.up"),
    ):
        plain += both(theirs, ours)
    plain += row_parallel("feed_forward1.linear2", "ff1.down") + row_parallel(
        "feed_forward2.linear2", "ff2.down"
    )
    plain += separate([f"self_attn.{n}_proj" for n in "qkv"])
    plain += [("self_attn.relative_k_proj.weight", ("attention.distance",))]
    plain += [
        ("self_attn.bias_u", ("attention.to_content",)),
        ("self_attn.bias_v", ("attention.to_distance",)),
    ]
    plain += [("self_attn.o_proj.weight", ("attention.out.weight",))]
    plain += [("self_attn.o_proj.bias", ("attention.bias_out",))]
    conv = "convolution."
    plain += [("conv.pointwise_conv1.bias", (f"{conv}bias_value", f"{conv}bias_gate"))]
    plain += [("conv.depthwise_conv.bias", (f"{conv}bias_depth",))]
    plain += [("conv.pointwise_conv2.bias", (f"{conv}bias_out",))]
    for theirs, ours in (("weight", "scale"), ("bias", "shift"), ("running_mean", "mean")):
        plain += [(f"conv.norm.{theirs}", (conv + ours,))]
    plain += [("conv.norm.running_var", (f"{conv}variance",))]
    return [
        *[Row(there, here) for there, here in plain],
        Row("conv.pointwise_conv1.weight", (f"{conv}value", f"{conv}gate"), (-1, 1)),
        Row("conv.depthwise_conv.weight", (f"{conv}depth",), (1, -1)),
        Row("conv.pointwise_conv2.weight", (f"{conv}out.weight",), (-1, 1)),
    ]


def parakeet_rows(cfg: Any) -> Rows:
    stem = both("subsampling.linear", "subsample.out")
    for i, (weight, bias) in {
        0: ("conv", "conv_bias"),
        2: ("depth1", "depth_bias1"),
        3: ("point1", "point_bias1"),
        5: ("depth2", "depth_bias2"),
        6: ("point2", "point_bias2"),
    }.items():
        at = f"subsampling.layers.{i}."
        stem += [(f"{at}weight", (f"subsample.{weight}",)), (f"{at}bias", (f"subsample.{bias}",))]
    out = rows(stem)
    for n in range(cfg.layers):
        out += [(row, f"layers.{n}.", f"blocks.{n}.") for row in parakeet_block()]
    return out


def parakeet_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, most rows, width] of input_features [n, frames, mels]; zero after a clip's rows,
    which its attention_mask tells."""
    values = inputs["input_features"]
    assert isinstance(encoder, Parakeet)
    lengths = real(inputs, values)
    return stacked(encoder, values, lengths, [{"frames": n} for n in lengths])


PARAKEET = Family(
    encoder="parakeet",
    model_types=("parakeet_encoder", "parakeet_ctc", "parakeet_tdt", "parakeet_rnnt", "parakeet"),
    probe="subsampling.linear.weight",
    options=parakeet_options,
    rows=parakeet_rows,
    unused=(r"layers\.\d+\.conv\.norm\.num_batches_tracked", r"feature_extractor\..*"),
    features=parakeet_features,
    free=FREE,
)


def flamingo_options(part: Part) -> dict[str, Any]:
    needed(part, {"scale_embedding": False})
    names = {"width": ("hidden_size", 1280), "heads": ("num_attention_heads", 20)}
    sizes = {"layers": ("num_hidden_layers", 32), "mlp": ("intermediate_size", 5120)}
    return {**fields(part, {**names, **sizes}), **whisper_sound(part, mels=128)}


def flamingo_features(encoder: Encoder, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden state [n, most rows, width] of input_features [n, mels, frames] with their mask; zero after
    a clip's rows."""
    values, mask = inputs["input_features"].transpose(1, 2), inputs["input_features_mask"]
    frames = values.shape[1]
    return stacked(encoder, values, [frames] * len(values), [{"frames": n} for n in mask.sum(-1).tolist()])


FLAMINGO = Family(
    encoder="audioflamingo3",
    model_types=("audioflamingo3_encoder", "audioflamingo3"),
    probe="conv1.weight",
    options=flamingo_options,
    rows=whisper_rows,
    unused=(),
    features=flamingo_features,
    free=FREE,
)

FAMILIES = (WHISPER, WAV2VEC2, PARAKEET, FLAMINGO)
