"""Adapters on published models: trained alike in any layout, merged in exports, in folders as of peft.

The peft package is not needed but in one slow test: its names are those of modules of transformers' class,
onto whose weights the tests add B A * alpha / r themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.config import LLMConfig
from llm.hf.peft import AdapterFolder, adapter_tensors
from llm.hf.weights import checkpoint_tensors
from llm.model import LLM
from mm.checkpoint import saver
from mm.checkpoint.adapters import export_adapters
from mm.checkpoint.folders import export_hf
from mm.checkpoint.weights import fill_adapters, fill_encoders, start_from
from mm.cli import main
from mm.errors import CheckpointError
from mm.train.one_step import train_step
from parallel.published import module_shapes
from parallel.sharding.low_rank import LowRank, adapters_of, add_adapters
from tests.llm.families import build, config_of, even, prepare
from tests.llm.oracle import save
from tests.llm.widened import Widened
from tests.mm.harness import running, small
from tests.slow import on_demand

import transformers  # isort: skip

LORA = {"rank": 3, "alpha": 12.0, "targets": ["all-linear"]}


def losses(raw: dict[str, Any], start: str, folder: str | None) -> list[float]:
    """Losses of three steps from a published folder, and a checkpoint after them."""
    with running(raw) as (job, feed):
        start_from(job, [Path(start)])
        fill_encoders(job)
        found = [train_step(job, feed, step).loss for step in range(3)]
        if folder is not None:
            saver.save(job, feed.index, Path(folder), 3, feed.bad)
        return found


def begun(raw: dict[str, Any], start: str, folder: str) -> None:
    """A checkpoint of a run before its first step."""
    with running(raw) as (job, feed):
        fill_adapters(job)
        start_from(job, [Path(start)])
        saver.save(job, feed.index, Path(folder), 0, feed.bad)


def config(folder: Path, **llm: Any) -> dict[str, Any]:
    """A run from the folder of a language model, with adapters."""
    raw = small(train={"lr": 0.02, "warmup": 0.0, "lora": {"llm": LORA}})
    raw["model"]["llm"] = {"preset": str(folder), **llm}
    raw["checkpoint"] = {"weights": str(folder)}
    return raw


@torch.no_grad()
def logits_with(base: Path, adapters: Path) -> Tensor:
    """Logits of transformers' class with the adapters of a folder added by their names."""
    said = json.loads((adapters / "adapter_config.json").read_text())
    model = opened(base)
    tensors, modules = load_file(adapters / "adapter_model.safetensors"), dict(model.named_modules())
    before = "base_model.model."
    for name in said["target_modules"]:
        a, b = (tensors.pop(f"{before}{name}.lora_{x}.weight") for x in "AB")
        assert a.shape[0] == b.shape[1] == said["r"]
        modules[name].weight += b @ a * (said["lora_alpha"] / said["r"])
    assert not tensors, "all adapters have a map"
    return logits_of(model)


def opened(folder: Path) -> Any:
    with Widened():
        return prepare(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    with Widened():
        found: Tensor = model(input_ids=torch.arange(20)[None] * 7 % 264, use_cache=False).logits
    return found


FAMILIES = ["llama", "gemma3_text", "qwen3", "deepseek_v3", "glm4_moe", "olmo2", "qwen2"]


@pytest.mark.parametrize("name", on_demand(FAMILIES, FAMILIES[1:]))
def test_they_are_trained_merged_and_told_apart(name: str, ranks: Any, tmp_path: Path) -> None:
    given = even(name, 0) | {"vocab_size": 264}
    folder = save(build(config_of(name, given), torch.float64), tmp_path / "in")
    raw = config(folder, expert_bias_rate=0.0)
    alone = ranks(1, losses, raw, str(folder), None)[0]
    layout = {"llm": {"tp": 2, "sequence_parallel": True}, "audio": {"cp": 2}}
    spread = ranks(2, losses, {**raw, "layout": layout}, str(folder), str(tmp_path / "run"))
    assert all(found == pytest.approx(alone, rel=1e-9) for found in spread)
    assert alone[-1] != pytest.approx(alone[0], rel=1e-3)
    saved = tmp_path / "run" / "step-00000003"
    export_hf(saved, tmp_path / "merged", None, name)
    expected = logits_of(opened(tmp_path / "merged"))
    export_adapters(saved, tmp_path / "adapters", None, None)
    torch.testing.assert_close(logits_with(folder, tmp_path / "adapters"), expected, rtol=1e-9, atol=1e-9)
    assert (expected - logits_of(opened(folder))).abs().max() > 1e-3, "adapters count"
    # Read back they are the trained ones, in another layout, and nothing is lost on the way.
    raw["train"]["lora"] = {"llm": {**LORA, "weights": str(tmp_path / "adapters")}}
    ranks(2, begun, {**raw, "layout": {"llm": {"pp": 2}}}, str(folder), str(tmp_path / "again"))
    export_adapters(tmp_path / "again" / "step-00000000", tmp_path / "back", None, None)
    old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapters", "back"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_peft_package_reads_what_is_written(name: str, ranks: Any, tmp_path: Path) -> None:
    """And what it saves itself is read here; it is installed on no machine of this project."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    folder = save(build(config_of(name, even(name, 0) | {"vocab_size": 264}), torch.float64), tmp_path / "in")
    raw = config(folder)
    ranks(1, losses, raw, str(folder), str(tmp_path / "run"))
    saved = tmp_path / "run" / "step-00000003"
    export_adapters(saved, tmp_path / "adapters", None, None)
    export_hf(saved, tmp_path / "merged", None, name)
    theirs = peft.PeftModel.from_pretrained(
        opened(folder), tmp_path / "adapters", torch_device="cpu"
    ).double()
    expected = logits_of(opened(tmp_path / "merged"))
    torch.testing.assert_close(logits_of(theirs), expected, rtol=1e-9, atol=1e-9)
    theirs.save_pretrained(tmp_path / "saved")
    raw["train"]["lora"] = {"llm": {**LORA, "weights": str(tmp_path / "saved")}}
    ranks(1, begun, raw, str(folder), str(tmp_path / "again"))
    export_hf(tmp_path / "again" / "step-00000000", tmp_path / "both", None, name)
    torch.testing.assert_close(logits_of(opened(tmp_path / "both")), expected, rtol=1e-9, atol=1e-9)


UNFIT = {
    "rank": ({"r": 4}, "rank 4 and alpha 12, the model of rank 3 and alpha 12; needed: rank: 4, alpha: 12"),
    "scale": ({"use_rslora": True}, "needed: rank: 3, alpha: 20.7846"),
    "kind": ({"use_dora": True}, "use_dora=True; needed: False"),
}


@pytest.mark.parametrize("what", [*UNFIT, "maps", "names", "shape"])
def test_a_folder_of_other_adapters_is_refused(what: str, tmp_path: Path) -> None:
    cfg = LLMConfig(**{**small()["model"]["llm"], "pattern": "*-", "expert_bias_rate": 0.0})
    low = LowRank(3, 12.0, ("q", "v"))
    changed, words = UNFIT.get(what, ({}, what))
    said = {"peft_type": "LORA", "r": 3, "lora_alpha": 12.0, **changed}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    model, held = LLM(cfg, device="meta"), {}
    add_adapters(model, low)
    shapes = module_shapes(model)
    for t in checkpoint_tensors(cfg):
        for ours, letter in zip(adapters_of(t.parts[0].name), "AB", strict=True):
            if ours in shapes:
                held[f"base_model.model.{t.key.removesuffix('.weight')}.lora_{letter}.weight"] = shapes[ours]
    assert len(held) == 4
    first = min(held)
    if what == "maps":
        held, words = (
            {k: s for k, s in held.items() if "v_proj" not in k},
            r"1 adapters and the model 2.*\['q'\]",
        )
    if what == "names":
        held["base_model.model.other.lora_A.weight"], words = (
            (3, 4),
            "other.lora_A.weight, no adapter of a map",
        )
    if what == "shape":
        held[first], words = (3, 5), r"has shape \[3, 5\], expected"
    save_file({k: torch.zeros(s) for k, s in held.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=words):
        adapter_tensors(cfg, low, AdapterFolder(tmp_path))


REFUSED = {
    "phi3": r"qkv_proj.weight of Phi-3 and Phi-4 holds q, k, v in one tensor.*merges",
    "glm4_moe": r"expert_bias_rate=0.001, so .* moved in training",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_adapters_alone_cannot_say_is_refused(name: str, ranks: Any, tmp_path: Path) -> None:
    folder = save(build(config_of(name, even(name, 0) | {"vocab_size": 264})), tmp_path / "in")
    saved = tmp_path / "run" / "step-00000003"
    ranks(1, losses, config(folder), str(folder), str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        export_adapters(saved, tmp_path / "out", None, None)
    assert not list(tmp_path.glob("out*"))
    assert main(["checkpoint", "export", str(saved), str(tmp_path / "merged"), "--family", name]) == 0
    assert main(["checkpoint", "export", "--adapters", str(tmp_path / "gone"), str(tmp_path / "x")]) == 4
