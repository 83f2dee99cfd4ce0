"""Jobs with published audio encoders: the same steps in any layout, in every dtype."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.encoders.helpers import wav
from tests.mm.harness import largest_difference, small, train_few
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
