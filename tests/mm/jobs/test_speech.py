"""Jobs with published audio encoders: the same steps in any layout, in every dtype."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mm.checkpoint.weights import fill_encoders
from mm.train.one_step import train_step
from tests.encoders.helpers import wav
from tests.mm.harness import largest_difference, running, small, train_few
from tests.mm.shards import write_shard

OPTIONS: dict[str, dict[str, Any]] = {
    "whisper": {"mlp": 48, "positions": 50, "sound": {"mels": 16, "seconds": 1.0}},
    "wav2vec2": {
        "mlp": 48,
        "channels": [4, 6, 5],
        "kernels": [10, 3, 2],
        "strides": [5, 8, 4],
        "reach": 6,
        "groups": 2,
    },
    "parakeet": {"ffn": 48, "channels": 4, "sound": {"mels": 16, "size": 512, "emphasis": 0.97}},
}


def clips(folder: Path, n: int = 12) -> Path:
    """Samples of up to two clips of several lengths and rates."""
    rng, samples = random.Random(2), []
    for k in range(n):
        sizes = [(rng.choice([700, 1300]), rng.choice([8000, 16000])) for _ in range(rng.choice([0, 1, 2]))]
        parts = {f"aud{i}.wav": wav(n, rate, 2, seed=k) for i, (n, rate) in enumerate(sizes)}
        segments = [*({"audio": name} for name in parts), {"text": str(k), "depends": "audio"}]
        samples.append({"key": f"s{k}", "segments": segments, "parts": parts})
    return write_shard(folder / "a.tar", samples).parent


def config(name: str, folder: Path, **train: Any) -> dict[str, Any]:
    raw = small(data={"train": [str(folder / "*.tar")], "context": 160}, train={**small()["train"], **train})
    options = {"width": 24, "heads": 4, "layers": 2, **OPTIONS[name]}
    audio = {"encoder": name, "projector": {"hidden": 24}, "options": options}
    raw["model"] = {"audio": audio, "llm": raw["model"]["llm"]}
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_an_audio_encoder_trains_alike_in_any_layout(name: str, tmp_path: Path, ranks: Any) -> None:
    raw = config(name, clips(tmp_path), shard="layer")
    expected = ranks(1, train_few, raw, 3)[0]
    assert expected[0]["grad_norm_by_module"]["audio"] > 0
    raw["train"]["recompute"] = True
    for layout in (
        {"audio": {"tp": 2, "sequence_parallel": True}, "llm": {"tp": 2}},
        {"audio": {"ranks": "0-1", "cp": 2}, "llm": {"ranks": "2-3", "pp": 2}},
        {"audio": {"pp": 2}},
    ):
        for steps in ranks(4, train_few, {**raw, "layout": layout}, 3):
            assert largest_difference(steps, expected) < 1e-9
    for dtype, far in (("float32", 1e-5), ("bfloat16", 0.02)):
        raw["train"]["dtype"] = dtype
        losses = [step["loss"] for step in ranks(2, train_few, raw, 1)[0]]
        assert losses == pytest.approx([expected[0]["loss"]], rel=far) and losses[0] != expected[0]["loss"]


def started(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Metrics of the first steps of a job that starts from its encoders' folders."""
    with running(raw) as (job, feed):
        fill_encoders(job)
        return [asdict(train_step(job, feed, step)) for step in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_published_weights_are_read_in_any_layout(name: str, tmp_path: Path, ranks: Any) -> None:
    """Running statistics too, which are buffers."""
    from tests.encoders.speech import folder, model

    made = next(m for m in (model(name, seed) for seed in range(200)) if splits(m.config))
    raw = config(name, clips(tmp_path))
    raw["data"]["context"] = 400
    raw["model"]["audio"] |= {"weights": str(folder(made, tmp_path / "made")), "options": {}}
    expected = ranks(1, started, raw, 2)[0]
    for layout in (
        {"audio": {"tp": 2, "sequence_parallel": True}},
        {"audio": {"ranks": "0-1", "cp": 2}, "llm": {"ranks": "2-3"}},
        {"audio": {"pp": 2}},
    ):
        for steps in ranks(4, started, {**raw, "layout": layout}, 2):
            assert largest_difference(steps, expected) < 1e-9
    file = tmp_path / "made" / "model.safetensors"
    save_file({k: 1.1 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert largest_difference(ranks(1, started, raw, 1)[0], expected[:1]) > 1e-6


def splits(cfg: Any) -> bool:
    """Whether an encoder of this transformers config may be split over two ranks of tp or pp."""
    if hasattr(cfg, "encoder_layers"):
        heads, mlp, layers = cfg.encoder_attention_heads, cfg.encoder_ffn_dim, cfg.encoder_layers
    else:
        heads, mlp, layers = cfg.num_attention_heads, cfg.intermediate_size, cfg.num_hidden_layers
    return heads % 2 == 0 and mlp % 2 == 0 and layers == 2
