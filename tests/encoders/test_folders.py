"""Folders of published encoders: whole models, prefixes, options beside a folder's, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoders
from encoders.hf import load_hf, open_folder
from encoders.module import build_encoder_module
from parallel.topology.axis import Axes
from tests.encoders import published


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.saved(published.oracle("siglip", torch.float32), tmp_path_factory.mktemp("siglip"))


def changed(folder: Path, out: Path, rename: Any = lambda k: k, **config: Any) -> Path:
    """A copy of a folder with other keys of tensors (None: left out) or another config."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    kept = {rename(k): t for k, t in tensors.items() if rename(k) is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**said, **config}))
    return out


def test_prefixes_and_parts_of_whole_models_are_taken(siglip: Path, tmp_path: Path) -> None:
    given = {"pixel_values": torch.rand(1, 3, 16, 16)}
    expected = load_hf(siglip).features(given)
    for i, prefix in enumerate(("vision_model.", "model.", "vision_tower.vision_model.", "model.visual.")):
        folder = changed(siglip, tmp_path / str(i), lambda k, p=prefix: p + k)
        assert torch.equal(load_hf(folder).features(given), expected), prefix
    inner = json.loads((siglip / "config.json").read_text())
    del inner["model_type"]  # as older files have it
    whole = changed(siglip, tmp_path / "whole", lambda k: f"vision_model.{k}", vision_config=inner)
    (whole / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": inner}))
    tensors = load_file(whole / "model.safetensors")
    beside = {"text_model.head.weight": torch.ones(2), "logit_scale": torch.ones(())}
    save_file({**tensors, **beside}, whole / "model.safetensors")
    net = load_hf(whole)
    assert torch.equal(net.features(given), expected)
    assert set(beside) <= set(net.unused) and "vision_model.head.probe" in net.unused


def test_a_folder_is_read_in_the_dtype_asked_for(siglip: Path) -> None:
    assert {p.dtype for p in load_hf(siglip).parameters()} == {torch.float32}
    assert {p.dtype for p in load_hf(siglip, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_what_does_not_fit_is_named(siglip: Path, tmp_path: Path) -> None:
    def refused(out: str, why: str, *args: Any, **config: Any) -> None:
        with pytest.raises(ValueError, match=why):
            load_hf(changed(siglip, tmp_path / out, *args, **config))

    lost = "encoder.layers.1.mlp.fc1.bias"
    refused("missing", f"missing: {lost}", lambda k: None if k == lost else k)
    refused(
        "unknown", "unknown: encoder.layers.1.mlp.fc9.bias", lambda k: k.replace("1.mlp.fc1.b", "1.mlp.fc9.b")
    )
    shape = r"encoder.layers.0.mlp.fc1.weight has shape \[36, 24\], expected \[40, 24\]"
    refused("shape", shape, intermediate_size=40)
    refused(
        "family",
        "is of model_type llama, and no encoder that is known here; known: siglip_vision_model",
        model_type="llama",
    )
    refused("act", "config.json has hidden_act='tanh'; known: gelu", hidden_act="tanh")
    refused("side", r"config.json has image_size=\[16, 20\]; needed: a square", image_size=[16, 20])
    empty = "has no tensor embeddings.patch_embedding.weight"
    refused("empty", empty, lambda k: None if "patch" in k else k)
    with pytest.raises(ValueError, match="no encoder that is known here as clip"):
        open_folder(siglip, "clip")


def test_options_beside_a_folder_agree_or_are_refused(siglip: Path) -> None:
    opened = open_folder(siglip, "siglip")
    cls = opened.cls

    def options(**named: Any) -> Any:
        return opened.options(cls.Config(**named), named)

    assert options() == options(width=24) == opened.cfg
    assert options(layers=2, final_norm=False, merge=2).layers == 2
    for name, value in (("width", 25), ("layers", 4), ("table", 5), ("activation", "gelu")):
        why = re.escape(
            f"has {name}={getattr(opened.cfg, name)!r}, the options {name}={value!r}; needed: the same"
        )
        with pytest.raises(ValueError, match=why):
            options(**{name: value})


def test_a_layer_before_the_last_is_llavas(siglip: Path) -> None:
    """hidden_states[-2] of transformers: fewer layers, without the final norm."""
    from encoders.hf import fill
    from encoders.hf.processor import dense_batch

    opened = open_folder(siglip)
    cfg = opened.options(opened.cls.Config(layers=2, final_norm=False), {"layers": 2, "final_norm": False})
    net = build_encoder_module(opened.cls, cfg, d_out=8, projector_hidden=8, axes=Axes())
    fill(net, opened)
    pixels = torch.rand(2, 3, 16, 16)
    oracle = published.oracle("siglip", torch.float32)
    expected = oracle(pixels, output_hidden_states=True).hidden_states[-2]
    found = net.encoder(dense_batch(cfg, pixels))
    assert torch.allclose(found.values.view_as(expected), expected, atol=1e-5)


@pytest.mark.parametrize("name", published.NAMES)
def test_no_items_give_no_rows_and_zero_gradients(name: str, tmp_path: Path) -> None:
    """A rank without items must still send a gradient to each of its weights."""
    opened = open_folder(published.saved(published.oracle(name, torch.float32), tmp_path))
    net = build_encoder_module(opened.cls, opened.cfg, d_out=8, projector_hidden=8, axes=Axes())
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    empty = encoders.pack_items(opened.cls, opened.cfg, [], [], device="cpu", dtype=torch.float32)
    found = net(empty)
    assert found.rows == () and len(found.values) == 0
    found.values.sum().backward()
    lacking = [n for n, p in net.named_parameters() if p.grad is None or bool(p.grad.any())]
    assert not lacking


def test_whole_models_of_transformers_are_taken(tmp_path: Path) -> None:
    """Llava, and Qwen3-VL, whose language models' keys are left alone."""
    import transformers

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    clip, qwen = (published.MODELS[name] for name in ("clip", "qwen3_vl"))
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=clip[1](**clip[2]), text_config=transformers.LlamaConfig(**text)
        )
    ).eval()
    vision = {**qwen[2], "out_hidden_size": 32}
    three = transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(vision_config=vision, text_config=text)
    ).eval()
    for name, model, tower in (
        ("clip", llava, llava.model.vision_tower),
        ("qwen3_vl", three, three.model.visual),
    ):
        net = load_hf(published.saved(model, tmp_path / name))
        assert net.unused
        for given in published.inputs(name, tower, dtype=torch.float32)[:2]:
            expected = published.run(name, tower, given)
            assert torch.allclose(net.features(given), expected, atol=1e-5), name
