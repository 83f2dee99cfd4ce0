"""The job is a straight-line program of plain torch: losses, norms, rates and weights after five steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.encoders.helpers import png, wav
from tests.mm import reference
from tests.mm.harness import small, train_and_weigh
from tests.mm.shards import write_shard
from tests.slow import on_demand

STEPS = 5


def written(n: int, seed: int, key: str) -> list[dict[str, Any]]:
    """Ragged samples: no to two pictures and clips of several sizes, texts in any script, not all learned."""
    rng = random.Random(seed)
    out = []
    for k in range(n):
        parts: dict[str, bytes] = {}
        segments: list[dict[str, Any]] = [{"text": rng.choice(["What is it? ", "hört "]), "loss": False}]
        for i in range(rng.choice([0, 1, 1, 2])):
            height, width = rng.choice([(8, 8), (4, 12), (12, 8)])
            parts[f"img{i}.png"] = png(height, width, seed=100 * seed + 10 * k + i)
            segments += [{"vision": f"img{i}.png"}, {"text": f" {height}", "depends": "vision"}]
            segments += [{"vision": "img0.png"}] * (k % 3)  # seen again, up to twice, and so computed once
        for i in range(rng.choice([0, 1, 1, 2])):
            length = rng.choice([700, 1600, 2345])
            parts[f"aud{i}.wav"] = wav(length, width=2, seed=100 * seed + 10 * k + i)
            segments += [{"audio": f"aud{i}.wav"}, {"text": f" {length} 七"}]
        rng.shuffle(segments)
        out.append({"key": f"{key}{k:03d}", "segments": segments, "parts": parts})
    return out


# 11 samples, of which steps of 4 see some again in another epoch; the rate rises, holds and falls.
TRAIN = {
    "steps": STEPS,
    "global_batch": 4,
    "dtype": "float64",
    "lr": 1e-2,
    "min_lr": 1e-3,
    "warmup": 0.4,
    "decay": 0.4,
    "betas": [0.8, 0.9],
    "eps": 1e-4,
    "weight_decay": 0.3,
}
OBJECTIVES = {"aux_weight": 0.3, "z_weight": 0.2, "mtp_layers": 2, "mtp_weight": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "next token": {"expert_bias_rate": 0.05},
    "all objectives": {"expert_bias_rate": 0.05, **OBJECTIVES},
}
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "one process": ("next token", 1, {}, {}),
    "micro-batches": ("next token", 1, {}, {"microbatches": 3}),
    "homogeneous": ("next token", 4, {}, {}),
    "heterogeneous": (
        "next token",
        4,
        {"vision": SP, "audio": {"cp": 2, "pp": 2}, "llm": {"tp": 2, "ep": 4, "sequence_parallel": True}},
        {"microbatches": 4, "encoder_batch": {"vision": 3, "audio": 2}},
    ),
    "disjoint, pipelines": (
        "next token",
        4,
        {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": "2-3", "pp": 2}},
        {"microbatches": 3},
    ),
    "objectives, one process": ("all objectives", 1, {}, {}),
    "objectives, cp and tp": ("all objectives", 4, {"llm": {"cp": 2, "tp": 2, "ep": 2}}, {}),
    "objectives, zero bubble": (
        "all objectives",
        4,
        {"audio": {"ranks": "0-1"}, "llm": {"pp": 2, "ep": 2}},
        {"microbatches": 3, "kind": "zero_bubble"},
    ),
}


def config(folder: Path, model: str, clip: float) -> dict[str, Any]:
    raw = small(data={"train": [str(folder / "any-*.tar")]}, train={**TRAIN, "clip": clip})
    raw["model"]["llm"] |= MODELS[model]
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    write_shard(folder / "any-a-000000.tar", written(6, 1, "a"))
    write_shard(folder / "any-b-000001.tar", written(5, 2, "b"))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """By model: (clip, metrics, weights); the bound cuts some steps' gradients and leaves others."""
    out = {}
    for model in MODELS:
        norms = [m["grad_norm"] for m in reference.train(config(folder, model, 0.0), 2)[0]]
        clip = sum(norms) / 2
        metrics, weights = reference.train(config(folder, model, clip), STEPS)
        out[model] = clip, metrics, {k: v.numpy() for k, v in weights.items()}
    return out


def same_metrics(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare metrics of a job and of the reference."""
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "lr", "grad_norm", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-9, abs=0), (a["step"], key)
        for key in ("grad_norm_by_module", "objectives"):
            some = {k: v for k, v in b[key].items() if k in a[key]}
            assert a[key] == pytest.approx(some, rel=1e-9, abs=0), (a["step"], key)
        for key in ("loss_by_modality", "loss_by_source"):
            assert a[key].keys() == b[key].keys()
            for name, (loss, tokens) in a[key].items():
                assert (loss, tokens) == (pytest.approx(b[key][name][0], rel=1e-9), b[key][name][1])


def hold(name: str, folder: Path, expected: Any, run: Any) -> None:
    """Train under LAYOUTS[name] by run(ranks, function, *args), and compare."""
    model, world, layout, schedule = LAYOUTS[name]
    clip, metrics, weights = expected[model]
    raw = config(folder, model, clip) | {"layout": layout, "schedule": schedule}
    unseen = {name: np.ones(w.shape, dtype=bool) for name, w in weights.items()}
    for ours, held in run(world, train_and_weigh, raw, STEPS):
        same_metrics(ours, metrics)
        assert len(ours[0]["objectives"]) == (3 if "mtp_layers" in MODELS[model] else 0)
        for name, (index, value) in held.items():
            at = np.ix_(*index)
            unseen[name][at] = False
            # A step moves weights by about the rate; the bias of keys has no gradient, which leaves rounding.
            scale = max(np.abs(weights[name]).max(), TRAIN["lr"])
            assert np.abs(value - weights[name][at]).max(initial=0.0) < 1e-9 * scale, name
    assert not any(rest.any() for rest in unseen.values())


@pytest.mark.parametrize("name", [n for n, (_, world, *_) in LAYOUTS.items() if world == 1])
def test_one_process_is_the_straight_line_program(name: str, folder: Path, expected: Any, alone: Any) -> None:
    hold(name, folder, expected, alone)


@pytest.mark.parametrize(
    "name",
    on_demand(
        [n for n, (_, world, *_) in LAYOUTS.items() if world > 1],
        ["homogeneous", "objectives, zero bubble", "objectives, cp and tp"],
    ),
)
def test_any_layout_is_the_straight_line_program(name: str, folder: Path, expected: Any, ranks: Any) -> None:
    hold(name, folder, expected, ranks)


def test_the_bound_cuts_some_gradients_and_leaves_others(expected: dict[str, Any]) -> None:
    for clip, metrics, _ in expected.values():
        assert min(m["grad_norm"] for m in metrics) < clip < max(m["grad_norm"] for m in metrics)
