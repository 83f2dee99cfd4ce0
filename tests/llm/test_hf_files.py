"""Published folders: read and written byte for byte, whole or in a layout; and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.config import LLMConfig
from llm.flops import param_count
from llm.hf import export_checkpoint, load_hf, load_weights, read_config, save_hf, write_config
from llm.hf.nemotron_h import ALIASES
from llm.hf.weights import checkpoint_tensors
from llm.model import LLM
from llm.presets import PRESETS, preset
from mm.config.outline import llm_config
from mm.config.schema import from_mapping
from parallel import checkpoint as checkpoint
from parallel.published import SafeFolder, module_tensors
from parallel.topology.stage import Stage
from tests.llm.folders import Counting, differing, into_layout, read_all
from tests.llm.harness import Text, make_batch, tiny
from tests.llm.oracle import oracle, run, save
from tests.mm.harness import CONFIGS, small

SMALL = tiny(
    pattern="ME*-EM", d_model=24, vocab_size=40, n_heads=4, n_kv_heads=2, head_dim=6, mamba_head_dim=4,
    mamba_groups=2, n_experts=6, top_k=2, expert_ffn=10, shared_ffn=14, mlp_ffn=18, init_std=0.02,
)  # fmt: skip


def random_config(seed: int) -> LLMConfig:
    """Any pattern, latent or not, grouped or not, with or without multi-token prediction and biases."""
    r = random.Random(seed)
    latent = r.choice([None, 8])
    return replace(
        SMALL,
        pattern="".join(r.choices("ME*-", k=r.randint(1, 6))),
        latent=latent,
        mlp_bias=latent is None and r.random() < 0.5,
        expert_groups=(groups := r.choice([1, 3])),
        top_groups=min(groups, 2),
        mtp_layers=r.choice([0, 1, 3]),
        mtp_pattern="".join(r.choices("ME*-", k=r.randint(1, 4))),
        conv_kernel=r.randint(2, 4),
        mamba_groups=r.choice([1, 2, 8]),
        activation=r.choice(["relu2", "gelu", "silu"]),
        norm_top_k=r.random() < 0.5,
    )


def write_random(
    cfg: LLMConfig, path: Path, files: int, seed: int = 0, mixed: bool = False
) -> dict[str, Tensor]:
    """A published folder of random values in `files` files; mixed: in several dtypes."""
    gen, r = torch.Generator().manual_seed(seed), random.Random(seed)
    path.mkdir()
    kinds: dict[str, torch.dtype] = {}  # one for all parts of one of our parameters
    out = {}
    for t in checkpoint_tensors(cfg):
        kind = r.choice([torch.bfloat16, torch.float32, torch.float16]) if mixed else torch.float32
        kind = kinds.setdefault(t.parts[0].name, kind)
        if "bias" in t.key:
            kind = torch.float32
        out[t.key] = torch.randn(t.shape, generator=gen).to(kind)
    keys = list(out)
    r.shuffle(keys)
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    for i, name in enumerate(names):
        save_file({k: out[k] for k in keys[i::files]}, path / name, metadata={"format": "pt"})
    index = {"weight_map": {k: names[i % files] for i, k in enumerate(keys)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(write_config(cfg, "float32")))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_bytes_there_and_back(tmp_path: Path, seed: int) -> None:
    cfg = random_config(seed)
    files = write_random(cfg, tmp_path / "in", files=1 + seed % 3, seed=seed, mixed=True)
    model = load_hf(tmp_path / "in").model
    assert model.cfg == read_config(write_config(cfg, "float32"))
    save_hf(model, tmp_path / "out", file_bytes=4096)
    assert not differing(read_all(tmp_path / "out"), files)
    # The written folder can be read again, by its own index and config.
    again = module_tensors(load_hf(tmp_path / "out").model)
    assert not differing(again, module_tensors(model))


@pytest.mark.parametrize("seed", range(8))
def test_configs_there_and_back(seed: int) -> None:
    cfg = random_config(seed)
    data = json.loads(json.dumps(write_config(cfg, "bfloat16")))
    back = read_config(data)
    assert write_config(back, "bfloat16") == data
    shapes = {t.key: t.shape for t in checkpoint_tensors(cfg)}
    assert {t.key: t.shape for t in checkpoint_tensors(back)} == shapes


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("nemotron")])
def test_published_models_have_all_their_tensors(name: str) -> None:
    """Elements of the files' tensors, but for the selection biases, are the parameters of the model."""
    cfg = preset(name)
    tensors = [t for t in checkpoint_tensors(cfg) if not t.key.endswith("e_score_correction_bias")]
    assert sum(prod(t.shape) for t in tensors) == param_count(cfg)[0]
    experts = len([t for t in tensors if ".experts." in t.key])
    blocks = cfg.symbols.count("E") + (cfg.mtp_pattern.count("E") if cfg.mtp_layers else 0)
    assert experts == 2 * cfg.n_experts * blocks


def mtp_keys(pattern: str) -> set[str]:
    cfg = replace(SMALL, mtp_layers=1, mtp_pattern=pattern)
    return {t.key for t in checkpoint_tensors(cfg) if t.key.startswith("mtp.")}


def test_multi_token_prediction_has_its_published_names() -> None:
    """As in Nemotron 3 Super: joining weights are in the block's first layer, the last norm in its last."""
    experts = {f"1.mixer.experts.{e}.{n}_proj.weight" for e in range(SMALL.n_experts) for n in ("up", "down")}
    shared = {f"1.mixer.shared_experts.{n}_proj.weight" for n in ("up", "down")}
    gate = {"1.mixer.gate.weight", "1.mixer.gate.e_score_correction_bias"}
    norms = {"0.enorm.weight", "0.hnorm.weight", "0.norm.weight", "1.norm.weight", "1.final_layernorm.weight"}
    attention = {f"0.mixer.{n}_proj.weight" for n in "qkvo"}
    expected = {"0.eh_proj.weight"} | norms | attention | gate | shared | experts
    assert mtp_keys("*E") == {f"mtp.layers.{key}" for key in expected}
    joins = {"enorm", "hnorm", "eh_proj", "final_layernorm"}
    assert {k for k in mtp_keys("-") if k.split(".")[3] in joins} == {
        f"mtp.layers.0.{n}.weight" for n in joins
    }


def test_a_stored_block_is_applied_as_often_as_asked(tmp_path: Path) -> None:
    """Files say that there is one block, not how often it was trained to be applied."""
    cfg = replace(SMALL, vocab_size=512, mtp_layers=1)
    folder = tmp_path / "in"
    files = write_random(cfg, folder, files=2)

    def named(**options: Any) -> LLMConfig:
        return llm_config(from_mapping(small(model={"llm": {"preset": str(folder), **options}}), CONFIGS))

    assert named().mtp_layers == 1
    twice = named(mtp_layers=2)
    assert twice == replace(named(), mtp_layers=2)
    mtp = []
    for asked in (named(), twice):
        model = LLM(asked, dtype=torch.float32)
        load_weights(model, SafeFolder(folder))
        model(make_batch(Text((9, 4), 0, seed=1), 512)[0], {"vision": torch.zeros(0, cfg.d_model)})
        mtp.append(float(model.take_objectives()["mtp"]))
        save_hf(model, tmp_path / f"out{asked.mtp_layers}")
        assert not differing(read_all(tmp_path / f"out{asked.mtp_layers}"), files)
    assert 2 * mtp[1] > 1.5 * mtp[0] > 0  # a mean over depths
    # Whether there is a block at all is part of the model.
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 1 there and 0 here"):
        load_weights(LLM(named(mtp_layers=0)), SafeFolder(folder))


def test_fields_by_their_other_names() -> None:
    data = write_config(replace(SMALL, mtp_layers=1), "float32")
    expected = read_config(data)
    for theirs, name in ALIASES.items():
        if name in data:
            data[theirs] = data.pop(name)
    del data["hybrid_override_pattern"], data["mtp_hybrid_override_pattern"]
    limit = [0.0, {"__float__": "Infinity"}]  # as transformers writes it
    assert read_config({**data, "mamba_dt_limit": limit}) == expected


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    theirs = oracle("MEM*E-", dtype=torch.float32, moe_latent_size=16, n_group=4, topk_group=2)
    ours = load_hf(save(theirs, tmp_path / "theirs", max_shard_size="40KB"))
    save_hf(ours.model, tmp_path / "ours")
    assert not differing(read_all(tmp_path / "ours"), read_all(tmp_path / "theirs"))
    again = type(theirs).from_pretrained(tmp_path / "ours")
    again.set_experts_implementation("eager")
    for module in again.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    assert again.config.layers_block_type == theirs.config.layers_block_type
    ids = torch.arange(17)[None]
    assert torch.equal(run(again, ids), run(theirs, ids))


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"ep": 2},
    {"tp": 2, "ep": 2},
    {"tp": 2, "ep": 2, "sequence_parallel": True},
    {"etp": 2},
    {"tp": 2, "etp": 2},
    {"cp": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_straight_into_a_layout_and_back(tmp_path: Path, ranks: Any, layout: dict[str, Any]) -> None:
    # Fewer key/value heads and scan groups than tp ranks: ranks share them.
    cfg = replace(SMALL, latent=8, mtp_layers=1, n_kv_heads=1, mamba_groups=1)
    files = write_random(cfg, tmp_path / "in", files=2)
    results = ranks(2, into_layout, str(tmp_path / "in"), cfg, layout, str(tmp_path / "job"))
    for r in results:
        # No rank reads more than it holds.
        assert r["held"] == r["read"] < 0.75 * r["all"]
    (saved,) = checkpoint.published(tmp_path / "job")
    export_checkpoint(saved, tmp_path / "out", cfg, file_bytes=10_000)
    assert not differing(read_all(tmp_path / "out"), files)


@pytest.mark.parametrize("edge", [1, 3])
def test_a_stage_reads_its_own_layers(tmp_path: Path, edge: int) -> None:
    files = write_random(SMALL, tmp_path / "in", files=2)
    whole = module_tensors(load_hf(tmp_path / "in").model)
    seen = {}
    for stage in (Stage(0, edge, last=False), Stage(edge, 6, first=False)):
        part = LLM(SMALL, stage=stage)
        source = Counting(tmp_path / "in")
        load_weights(part, source)
        assert source.count < sum(t.numel() for t in files.values())
        seen |= module_tensors(part)
    assert not differing(seen, whole)


def spoil(path: Path, change: Any) -> None:
    """Change the tensors of a one-file folder."""
    tensors = read_all(path)
    change(tensors)
    for file in path.glob("model*"):
        file.unlink()
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.pop("backbone.layers.1.mixer.experts.3.up_proj.weight"), "missing: .*experts.3.up_proj"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown: extra"),
        (
            lambda t: t.update({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(83, 24)}),
            r"in_proj.weight has shape \[83, 24\], expected \[92, 24\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}),
            "lm_head.weight is stored as I8",
        ),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    write_random(SMALL, tmp_path / "in", files=1)
    spoil(tmp_path / "in", change)
    with pytest.raises(ValueError, match=words):
        load_hf(tmp_path / "in")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bloom"}, "model_type='bloom'; known: nemotron_h, llama"),
        ({"use_bias": True}, "use_bias=True; needed: False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hybrid_override_pattern": "MX"}, "'X' at layer 1"),
        ({"mlp_hidden_act": "mish"}, "known: relu2, silu, gelu"),
        ({"num_nextn_predict_layers": 2}, "one stored block or none"),
        ({"time_step_limit": [0.001, float("inf")]}, "clamps time steps"),
        ({"mamba_dt_limit": [0.0, 0.1]}, r"clamps time steps to \[0.0, 0.1\]"),
        ({"num_key_value_heads": None}, "num_key_value_heads=null; needed: a value, such as 8"),
        ({"n_group": 4}, "no multiple of expert_groups=4"),
    ],
)
def test_other_configs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config({**write_config(SMALL, "float32"), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 3}, "num_experts_per_tok is 2 there and 3 here"),
        (
            {"routed_scale": 1.0, "norm_eps": 1e-6},
            "layer_norm_epsilon .*; routed_scaling_factor is 2.5 there",
        ),
        ({"pattern": "ME*-E-"}, "hybrid_override_pattern is 'ME[*]-EM' there and 'ME[*]-E-' here"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_random(SMALL, tmp_path / "in", files=1)
    with pytest.raises(ValueError, match=words):
        load_weights(LLM(replace(SMALL, **change)), SafeFolder(tmp_path / "in"))
    # How the scan runs and how weights would have started is not part of the model.
    load_weights(LLM(replace(SMALL, chunk=4, init_std=1.0)), SafeFolder(tmp_path / "in"))


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 1e4}, {"mlp_gated": True}, {"tied": True}, {"shared_ffn": 0}, {"router": "softmax"}],
)
def test_models_that_the_format_cannot_say_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model = LLM(replace(SMALL, **change))
    with pytest.raises(ValueError, match="cannot say"):
        save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .*; needed: the whole"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickled and is not read"):
        load_hf(tmp_path)
    write_random(SMALL, tmp_path / "in", files=2)
    (tmp_path / "in" / "model-00002-of-00002.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing or no safetensors"):
        load_hf(tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_hf(tmp_path / "in")


def test_files_of_any_json_are_refused_in_words(tmp_path: Path) -> None:
    """As an index of weights, and as a config."""
    deep = "[" * 100_000
    for text in (deep, "[1]", "null", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}', "9" * 5000):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="is no index of safetensors files"):
            SafeFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for text in (deep, "[1]", "null", "{", "9" * 5000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json (is missing or unreadable|holds no object)"):
            SafeFolder(tmp_path).config()
