"""Adapters on published models: trained alike in any layout, merged in exports, in folders as of peft.

The peft package is not needed: its names are those of modules of transformers' class, onto whose weights the
test adds B A * alpha / r itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm.checkpoint import state as checkpoint
from mm.checkpoint.adapters import export_adapters
from mm.checkpoint.folders import export_hf
from mm.checkpoint.weights import fill_encoders, start_from
from mm.cli import main
from mm.errors import CheckpointError
from mm.train.trainer import train_step
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
            checkpoint.save(job, feed.index, Path(folder), 3, feed.bad)
        return found


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
