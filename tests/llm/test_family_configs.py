"""config.json of every family: as transformers understands it, in old and new spellings; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from llm.config import LLMConfig
from llm.hf import FAMILIES, export_family, read_config, write_config
from llm.hf.family import computed
from llm.presets import preset
from llm.rotary import RopeScaling
from llm.source import Source
from tests.llm.families import RANDOM, config_of, options

Data = dict[str, Any]
DECODERS = [name for name in RANDOM if name != "nemotron_h"]  # of which test_hf_files.py has the configs


def said(config: Any, *, all_keys: bool) -> Data:
    """config.json of a config object: all keys, or those that differ from the class's defaults."""
    return {**json.loads(config.to_json_string(use_diff=not all_keys)), "model_type": config.model_type}


@pytest.mark.parametrize("name", DECODERS)
def test_absent_keys_are_the_defaults_of_the_class(name: str) -> None:
    for seed in range(12):
        config = config_of(name, options(name, seed))
        whole, short = (read_config(said(config, all_keys=every)) for every in (True, False))
        assert computed(whole) == computed(short), seed
        assert whole.source == replace(short.source or Source(""), context=128)
    given = {"head_dim": 128} if name == "glm4_moe" else {}  # its defaults are no model: half of 42 is odd
    theirs = said(config_of(name, given), all_keys=True)
    assert computed(read_config({"model_type": name, **given})) == computed(read_config(theirs))


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_written_is_read_alike_by_both(name: str) -> None:
    for seed in range(12):
        cfg = read_config(said(config_of(name, options(name, seed)), all_keys=True))
        data = json.loads(json.dumps(write_config(cfg, "float32")))
        assert data["model_type"] == name
        assert read_config(data) == cfg
        theirs = config_of(name, {key: value for key, value in data.items() if key != "model_type"})
        assert computed(read_config(said(theirs, all_keys=True))) == computed(cfg), seed


LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Spellings of published files from before rope_parameters, each with fields that follow from it.
PUBLISHED: dict[str, tuple[Data, Data]] = {
    "Llama 2": ({"model_type": "llama", "pad_token_id": -1}, {"rope_theta": 1e4, "n_kv_heads": 32}),
    "Llama 3.1": (
        {
            "model_type": "llama",
            "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA_31, "original_max_position_embeddings": 8192},
            "max_position_embeddings": 131072,
        },
        {"rope_theta": 5e5, "rope_scaling": RopeScaling("llama3", 8.0, original=8192)},
    ),
    "Mistral 7B": ({"model_type": "mistral"}, {"window": 4096, "window_layers": None}),
    "Mistral 7B v0.3": ({"model_type": "mistral", "sliding_window": None}, {"window": None}),
    "Qwen 2.5, longer": (
        {
            "model_type": "qwen2",
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        {"rope_scaling": RopeScaling("yarn", 4.0, original=32768), "qkv_bias": True, "window": None},
    ),
    "Phi-3 mini 128k": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        },
        {"rope_scaling": RopeScaling("longrope", 32.0, 4096, short=(1.0,) * 48, long=(2.0,) * 48)},
    ),
    "Gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"window_layers": (0, 2, 4, 6, 8, 12), "window_rope_theta": 1e4, "rope_theta": 1e6, "tied": True},
    ),
    "Gemma 3 4B": (
        {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_scaling": RopeScaling("linear", 8.0), "window_rope_theta": 1e4},
    ),
    "SmolLM3": (
        {"model_type": "smollm3", "num_hidden_layers": 5, "rope_theta": 5e6},
        {"rope_skips": (6,), "tied": True, "rope_theta": 5e6},
    ),
    "GLM-4.5 Air": (
        {"model_type": "glm4_moe", "partial_rotary_factor": 0.5, "head_dim": 128},
        {"rope_share": 0.5},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_older_spellings_are_those_of_transformers(name: str) -> None:
    data, fields = PUBLISHED[name]
    cfg = read_config(data)
    assert {key: getattr(cfg, key) for key in fields} == fields
    given = {key: value for key, value in json.loads(json.dumps(data)).items() if key != "model_type"}
    theirs = config_of(data["model_type"], given)
    assert computed(read_config(said(theirs, all_keys=True))) == computed(cfg)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3'; known: nemotron_h, llama, mistral"),
        ({"model_type": "gemma3"}, "model_type='gemma3'; known: .*gemma3_text"),
        ({}, "model_type=None; known"),
        ({"model_type": "llama", "hidden_act": "mish"}, "hidden_act='mish'; known: silu, swish, gelu"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, "rope_type='linear' without a factor"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "rope_type='llama3' without original_max_position_embeddings",
        ),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; needed: 1"),
        ({"model_type": "llama", "rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "three axes"),
        ({"model_type": "qwen2", "rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "three numbers"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "needed: false"),
        ({"model_type": "olmo3", "num_hidden_layers": 1, "layer_types": ["x"]}, r"layer_types \['x'\]"),
        ({"model_type": "olmo3", "num_hidden_layers": 2, "layer_types": ["full_attention"]}, "layer_types 1"),
        ({"model_type": "granitemoehybrid", "layer_types": ["conv"] * 32}, r"layer_types \['conv'\]"),
        ({"model_type": "bamba", "mamba_conv_bias": False}, "mamba_conv_bias=False; needed: True"),
        ({"model_type": "bamba", "time_step_limit": [0.001, 0.1]}, "clamps time steps"),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "scales rotary speeds of sliding_attention",
        ),
    ],
)
def test_what_ours_cannot_be_is_refused(data: Data, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(data)


DENSE = LLMConfig(
    pattern="*-*-", d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, rope_theta=1e4, mlp_gated=True,
    activation="silu",
)  # fmt: skip


@pytest.mark.parametrize(
    ("cfg", "family"),
    [
        (DENSE, "llama"),
        (replace(DENSE, qkv_bias=True), "qwen2"),
        (replace(DENSE, qk_norm="head"), "qwen3"),
        (replace(DENSE, qk_norm="full", norms="after"), "olmo2"),
        (replace(DENSE, rope_share=0.5), "phi3"),
        (replace(DENSE, rope_skips=(0,)), "smollm3"),
        (replace(DENSE, branch_scale=0.5), "granite"),
        (replace(DENSE, source=Source("granite")), "granite"),
        (replace(DENSE, source=Source("mistral")), "mistral"),
        # What it was read from cannot say it any more.
        (replace(DENSE, qk_norm="head", source=Source("mistral")), "qwen3"),
        (preset("mixtral-8x7b"), "mixtral"),
        (preset("llama-3-8b"), "llama"),
        (preset("nemotron-3-nano-30b-a3b"), "nemotron_h"),
    ],
)
def test_a_model_is_written_as_what_it_was_or_the_first_that_can_say_it(cfg: LLMConfig, family: str) -> None:
    assert export_family(cfg).name == family
    assert computed(read_config(write_config(cfg, "float32"))).keys() == computed(cfg).keys()


def test_families_that_cannot_say_a_model_are_refused() -> None:
    with pytest.raises(ValueError, match="a Llama checkpoint cannot say qk_norm='head'; needed: 'none'"):
        write_config(replace(DENSE, qk_norm="head"), "float32", "llama")
    with pytest.raises(ValueError, match="'gpt2' is no family of language models here; known: nemotron_h"):
        write_config(DENSE, "float32", "gpt2")
    with pytest.raises(ValueError, match="a Llama checkpoint cannot say this model: d_model=32; needed"):
        write_config(replace(DENSE, n_heads=3, n_kv_heads=3), "float32", "llama")
    with pytest.raises(ValueError, match=r"Nemotron-H checkpoint cannot .*; a Bamba checkpoint cannot"):
        write_config(replace(DENSE, qk_norm="full", norms="both"), "float32")
    assert set(FAMILIES) == set(RANDOM)
