"""The README's two stages, from folders in the published format to an answer and an export."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llm
from encoders import compat
from examples import two_stages
from tests.mm.harness import free_port, run_job
from tests.pages import ROOT


@pytest.mark.slow
def test_published_folders_are_trained_asked_and_exported(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "two"
    two_stages.main(folder)
    text = (ROOT / "examples" / "two_stages.yaml").read_text()
    raw = yaml.safe_load(
        text.replace("../build/two-stages", str(folder)).replace("build/two-stages", str(folder))
    )
    raw["stages"] = [{**stage, "steps": 3, "layout": {}} for stage in raw["stages"]]
    raw["eval"]["samples"] = 8
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    ended = run_job(["train", str(config)], free_port())
    assert ended.code == 0, ended.err
    asked = run_job(
        ["generate", str(folder / "run" / "all"), "--image", str(folder / "digit.png"), "--tokens", "5"], 0
    )
    assert asked.code == 0 and asked.out.strip(), asked.err
    exported = folder / "exported"
    last = folder / "run" / "all" / "step-00000003"
    assert run_job(["checkpoint", "export", str(last), str(exported)], 0).code == 0
    compat.repair()
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    theirs, found = transformers.LlavaForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    ids = tokenizer(two_stages.sentence(4), return_tensors="pt").input_ids
    with torch.no_grad():
        logits = theirs.eval()(ids).logits
        torch.testing.assert_close(llm.load_hf(exported)(ids), logits, rtol=1e-5, atol=1e-5)
    ask = ["generate", str(exported), "--image", str(folder / "digit.png"), "--tokens", "5"]
    again = run_job(ask, 0)
    assert again.code == 0 and again.out == asked.out, again.err
