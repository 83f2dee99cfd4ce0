"""Folders of published families with other keys than ours writes, and what is refused of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.hf import load_hf, save_hf
from llm.model import LLM
from tests.llm.families import build, config_of, ids_of, options, save
from tests.llm.folders import differing, read_all


def folder_of(name: str, path: Path, **more: Any) -> tuple[Path, dict[str, Tensor]]:
    """A random model's folder, and its tensors."""
    save(build(config_of(name, options(name, 0) | more), torch.float32), path)
    return path, read_all(path)


def rewrite(path: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    save_file({key: t.clone() for key, t in tensors.items()}, path / "model.safetensors")
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, **config}))


def test_a_bare_model_is_read_without_its_stem(tmp_path: Path) -> None:
    path, tensors = folder_of("llama", tmp_path / "in", tie_word_embeddings=True)
    ids = ids_of()
    expected = load_hf(path)(ids)
    rewrite(path, {key.removeprefix("model."): t for key, t in tensors.items()})
    assert torch.equal(load_hf(path)(ids), expected)
    save_hf(load_hf(path).model, tmp_path / "out")
    assert not differing(read_all(tmp_path / "out"), tensors)


def test_stored_rotary_speeds_are_no_weights(tmp_path: Path) -> None:
    path, tensors = folder_of("llama", tmp_path / "in", tie_word_embeddings=False)
    speeds = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0) for i in range(2)}
    expected = load_hf(path)(ids_of())
    rewrite(path, tensors | speeds)
    assert torch.equal(load_hf(path)(ids_of()), expected)


def test_a_block_behind_the_last_is_left_out_where_the_family_has_one(tmp_path: Path) -> None:
    for name in ("glm4_moe", "llama"):
        path, tensors = folder_of(name, tmp_path / name)
        last = max(int(key.split(".")[2]) for key in tensors if key.startswith("model.layers."))
        rewrite(path, {**tensors, f"model.layers.{last + 1}.enorm.weight": torch.zeros(3)})
        if name == "glm4_moe":
            load_hf(path)
        else:
            with pytest.raises(ValueError, match=rf"unknown: model.layers.{last + 1}.enorm.weight"):
                load_hf(path)


def test_a_head_beside_a_tied_embedding_must_be_it(tmp_path: Path) -> None:
    path, tensors = folder_of("qwen3", tmp_path / "in", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    expected = load_hf(path)(ids_of())
    rewrite(path, {**tensors, "lm_head.weight": head})
    assert torch.equal(load_hf(path)(ids_of()), expected)
    head[-1, -1] += 1
    rewrite(path, {**tensors, "lm_head.weight": head})
    with pytest.raises(ValueError, match=r"differs from model.embed_tokens.weight, though its config"):
        load_hf(path)
    rewrite(path, {**tensors, "lm_head.weight": head}, tie_word_embeddings=False)
    assert not torch.equal(load_hf(path)(ids_of()), expected)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_selection_bias_that_a_family_has_no_tensor_for_is_refused(tmp_path: Path, bias: float) -> None:
    path, _ = folder_of("mixtral", tmp_path / "in", sliding_window=None)
    model = load_hf(path).model
    assert model.cfg.expert_bias_rate == 0
    model.moe_layers()[1].expert_bias[0] = bias
    if not bias:
        save_hf(model, tmp_path / "out")
        return
    with pytest.raises(ValueError, match=r"layers.3.mixer.expert_bias is not zero, and a Mixtral checkpoint"):
        save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_a_factor_on_embeddings_is_rounded_to_their_dtype(tmp_path: Path, name: str) -> None:
    theirs, ids = build(config_of(name, options(name, 0)), torch.bfloat16), ids_of().flatten()
    save(theirs, tmp_path / "in")
    assert torch.equal(load_hf(tmp_path / "in").model.embed_ids(ids), theirs.model.embed_tokens(ids))


def test_one_family_is_written_as_another_that_can_say_it(tmp_path: Path) -> None:
    path, tensors = folder_of("mistral", tmp_path / "in", sliding_window=None)
    save_hf(load_hf(path).model, tmp_path / "out", family="llama")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert not differing(read_all(tmp_path / "out"), tensors)
    assert torch.equal(load_hf(tmp_path / "out")(ids_of()), load_hf(path)(ids_of()))


def test_ids_of_special_tokens_and_the_longest_document_stay(tmp_path: Path) -> None:
    beside = {"bos_token_id": 0, "eos_token_id": [3, 5], "pad_token_id": 7}
    path, _ = folder_of("llama", tmp_path / "in", **beside)
    save_hf(load_hf(path).model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in beside} == beside
    assert written["max_position_embeddings"] == 128
    # A model that was not imported has none, not those of the class, which may be beyond its vocabulary.
    made = LLM(replace(load_hf(path).model.cfg, source=None))
    save_hf(made, tmp_path / "made")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    assert [written[key] for key in beside] == [None] * 3
