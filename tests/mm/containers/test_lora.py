"""Adapters on a whole model's folder: trained alike in two layouts, asked, and merged for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mm
from tests.encoders.helpers import png
from tests.llm.folders import read_all
from tests.mm.containers import made
from tests.mm.harness import free_port, run_job, run_rank
from tests.mm.inference.test_eval import questions
from tests.mm.shards import write_shard

import transformers  # isort: skip

SPREAD = {"llm": {"pp": 2}, "vision": {"cp": 2}}
LORA = {
    "llm": {"rank": 3, "alpha": 12.0, "targets": ["all-linear"]},
    "vision": {"rank": 2, "alpha": 8.0, "targets": ["all-linear"]},
}


def config(base: Path, name: str) -> list[str]:
    """The arguments of a run of a Llava's folder with adapters on both of its models."""
    raw = {
        "model": {"folder": str(base / "in"), "vision": {"freeze": "none"}},
        "run": {"dir": str(base / name), "timeout_s": 60.0},
        "data": {"train": [str(base / "a.tar")], "eval": [str(base / "a.tar")], "context": 128},
        "train": {"steps": 3, "global_batch": 4, "dtype": "float64", "lr": 0.02, "warmup": 0.0, "lora": LORA},
        "checkpoint": {"every": 3},
        "layout": SPREAD if name == "spread" else {},
    }
    (base / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    return ["train", str(base / f"{name}.yaml")]


@pytest.mark.slow
def test_a_llava_with_adapters_is_trained_asked_and_merged(tmp_path: Path, ranks: Any) -> None:
    folder = made.saved(made.llava("siglip", "llama", 1), tmp_path / "in")
    parts = {f"{k}.png": png(16, 16, seed=k, mode="RGB") for k in range(8)}
    samples = [
        {
            "key": "s" + name[0],
            "segments": [{"vision": name}, {"text": f"sees {name}"}],
            "parts": {name: data},
        }
        for name, data in parts.items()
    ]
    write_shard(tmp_path / "a.tar", samples)
    ended = [run_job(config(tmp_path, "one"), free_port())]
    ended += ranks(2, run_rank, config(tmp_path, "spread"), free_port())
    assert [e.code for e in ended] == [0, 0, 0], "".join(e.err for e in ended)
    steps = [tmp_path / name / "step-00000003" for name in ("one", "spread")]
    asked = ["--ask", str(questions(tmp_path)), "--tokens", "5"]
    for step in steps:
        assert run_job(["eval", str(step), *asked], free_port()).code == 0
    assert run_job(["checkpoint", "export", str(steps[1]), str(tmp_path / "out")], 0).code == 0
    before, after = made.named(read_all(folder)), made.named(read_all(tmp_path / "out"))
    for stem in ("vision_tower.", "language_model."):
        assert any(stem in k and not torch.equal(after[k], before[k]) for k in after.keys() & before.keys())
    ask = ["--text", "the quick", "--image", str(tmp_path / "a.png"), "--tokens", "9"]
    answers = [run_job(["generate", str(x), *ask], 0) for x in (steps[1], tmp_path / "out")]
    assert answers[0].code == 0 and answers[0].out == answers[1].out
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float64
    )
    model = made.prepare(model.eval())
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for step in steps:
        held = mm.load(step)
        rows = made.picture_rows(held.encoders["vision"], pixels)
        ids = made.asked(len(rows), made.IMAGE)
        modules = {"llm": held.llm, **held.encoders}
        found.append(made.logits_of(modules, ids, {"vision": (made.IMAGE, rows)}))
    assert made.far(found[1], found[0]) < 1e-9, "two layouts learn the same"
    with torch.no_grad():
        features = model.model.get_image_features(pixels, return_dict=True)
        # Rotary angles of a model that transformers loads are float32.
        assert made.far(found[1], made.asked_of(model, ids, {"image": features})) < 1e-6
