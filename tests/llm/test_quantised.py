"""Folders with quantised weights: what transformers makes of them, any block of them, written as bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm.hf import export_checkpoint, load_hf, save_hf
from parallel import checkpoint as checkpoint
from parallel.published import SafeFolder, dequantised
from tests.llm.families import SIZES, build, config_of, ids_of, options, save
from tests.llm.folders import differing, into_layout, read_all

import transformers  # isort: skip


def requantise(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """Put other tensors into a folder, and say how they are quantised."""
    save_file({key: t.contiguous() for key, t in tensors.items()}, path / "model.safetensors")
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "quantization_config": said}))


def mxfp4_folder(path: Path) -> Path:
    """A random GPT-OSS whose experts are random codes and scales, as published ones are."""
    given = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3}
    given |= {"num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}
    save(build(config_of("gpt_oss", given), torch.bfloat16), path)
    tensors, gen = read_all(path), torch.Generator().manual_seed(1)
    for key in [k for k in tensors if k.endswith(("gate_up_proj", "down_proj"))]:
        experts, d_in, d_out = tensors.pop(key).shape
        shape = (experts, d_out, d_in // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=gen, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(118, 125, shape, generator=gen, dtype=torch.uint8)
    requantise(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]})
    return path


def test_mxfp4_is_read_as_transformers_reads_it_and_written_as_bfloat16(tmp_path: Path) -> None:
    folder = mxfp4_folder(tmp_path / "in")
    how = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    ours = load_hf(folder)
    save_hf(ours.model, tmp_path / "out")
    held = {key: t.to(torch.bfloat16) for key, t in theirs.state_dict().items()}
    assert not differing(read_all(tmp_path / "out"), held)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "quantization_config" not in written
    again = load_hf(tmp_path / "out")
    assert torch.equal(ours(ids_of()), again(ids_of()))


@pytest.mark.slow
def test_ranks_read_their_shares(tmp_path: Path, ranks: Any) -> None:
    folder = mxfp4_folder(tmp_path / "in")
    whole = load_hf(folder).model
    save_hf(whole, tmp_path / "whole")
    ranks(2, into_layout, str(folder), whole.cfg, {"tp": 2, "etp": 2}, str(tmp_path / "job"))
    (saved,) = checkpoint.published(tmp_path / "job")
    export_checkpoint(saved, tmp_path / "out", whole.cfg, dtype=torch.bfloat16)
    assert not differing(read_all(tmp_path / "out"), read_all(tmp_path / "whole"))


def fp8_folder(path: Path, size: tuple[int, int]) -> tuple[Path, dict[str, Tensor]]:
    """A random Qwen 3 with its projections in FP8, and what they are, worked out in another way."""
    save(build(config_of("qwen3", options("qwen3", 1)), torch.bfloat16), path)
    tensors, gen, plain = read_all(path), torch.Generator().manual_seed(1), {}
    for key in list(tensors):
        if not key.endswith("_proj.weight"):
            plain[key] = tensors[key]
            continue
        weight = tensors[key]
        grid = [-(-n // m) for n, m in zip(weight.shape, size, strict=True)]
        scale = torch.rand(grid, generator=gen) + 0.5
        small = (100 * weight.float()).to(torch.float8_e4m3fn)
        wide = torch.kron(scale, torch.ones(size))[: weight.shape[0], : weight.shape[1]]
        plain[key] = (small.float() * wide).to(torch.bfloat16)
        tensors |= {key: small, f"{key}_scale_inv": scale}
    requantise(path, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(size)})
    return path, plain


def test_fp8_is_each_block_times_its_factor(tmp_path: Path) -> None:
    folder, plain = fp8_folder(tmp_path / "in", (10, 7))  # which divide no side of any weight
    save_hf(load_hf(folder).model, tmp_path / "out")
    assert not differing(read_all(tmp_path / "out"), plain)


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_any_block_is_that_of_the_whole(tmp_path: Path, kind: str) -> None:
    path = mxfp4_folder(tmp_path) if kind == "mxfp4" else fp8_folder(tmp_path, (10, 7))[0]
    folder, gen = dequantised(SafeFolder(path)), torch.Generator().manual_seed(0)
    for key in [k for k in folder.shapes() if k.endswith(("up_proj", "up_proj.weight", "down_proj"))]:
        whole = folder.read(key, ())
        assert whole.shape == folder.shapes()[key] and whole.dtype == folder.dtype(key)
        for _ in range(20):
            ends = [sorted(torch.randint(0, n + 1, (2,), generator=gen).tolist()) for n in whole.shape]
            index = [slice(*e) for e in ends]
            assert torch.equal(folder.read(key, index), whole[tuple(index)])


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "awq"}, "quantised as 'awq'.*needed: mxfp4, fp8 in blocks, or weights that are"),
        ({"quant_method": "fp8"}, "'fp8 without weight_block_size'"),
    ],
)
def test_other_ways_are_refused_by_name(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    path, _ = fp8_folder(tmp_path, (8, 8))
    requantise(path, read_all(path), said)
    with pytest.raises(ValueError, match=words):
        load_hf(path)


def test_a_scale_without_its_weight_is_refused(tmp_path: Path) -> None:
    path = mxfp4_folder(tmp_path)
    tensors = read_all(path)
    del tensors["model.layers.0.mlp.experts.down_proj_blocks"]
    requantise(path, tensors, {"quant_method": "mxfp4"})
    with pytest.raises(ValueError, match=r"down_proj_scales without .*down_proj_blocks, which it is"):
        load_hf(path)
