"""Statistics by layer: those of plain hooks and gradients in one process, and the same in any layout."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.train.one_step import train_step
from tests.mm import reference
from tests.mm.harness import CONFIGS, running, small
from tests.mm.jobs.test_reference import TRAIN
from tests.slow import on_demand

LAYER = re.compile(r"(layers|mtp\.layers|encoder\.blocks)\.\d+")

SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sequence parallelism and experts": (
        4,
        {"vision": SP, "audio": {"cp": 2, "pp": 2}, "llm": {"tp": 2, "ep": 4, "sequence_parallel": True}},
        {"microbatches": 4, "encoder_batch": {"vision": 3, "audio": 2}},
        {},
    ),
    "recomputed": (2, {"vision": {"tp": 2}, "llm": {"cp": 2}}, {"microbatches": 2}, {"recompute": True}),
    "tp and cp": (4, {"audio": {"tp": 2}, "llm": {"cp": 2, "tp": 2, "ep": 2}}, {}, {}),
    "virtual stages": (
        4,
        {"vision": {"ranks": "0-1"}, "audio": {"ranks": "2-3"}, "llm": {"pp": 2, "vpp": 2, "ep": 2}},
        {"microbatches": 4},
        {"shard": "layer"},
    ),
    "zero bubble": (
        4,
        {"audio": {"ranks": "0-1"}, "llm": {"pp": 2, "tp": 2, "etp": 2}},
        {"microbatches": 3, "kind": "zero_bubble"},
        {"recompute": True},
    ),
    **{
        policy: (4, {m: {"data_parallel": policy} for m in ("vision", "llm")}, {"microbatches": 2}, {})
        for policy in ("zero3", "replicate", "step")
    },
}


def config(**sections: Any) -> dict[str, Any]:
    raw = small(**sections)
    raw["train"] = {**raw["train"], "statistics": 2, "global_batch": 6}
    raw["model"]["llm"] |= {"mtp_layers": 2, "tied": True}
    raw["model"]["vision"]["freeze_layers"] = 1
    return raw


def layers(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The layers' statistics of the first steps."""
    with running(raw) as (job, feed):
        return [asdict(train_step(job, feed, step))["layers"] for step in range(steps)]


def differ(ours: Any, theirs: Any) -> float:
    """Largest difference, by the scale of the numbers: of a mean by the rms beside it."""
    if not isinstance(theirs, dict):
        assert ours == theirs
        return 0.0
    assert ours is not None and ours.keys() == theirs.keys()
    if "max" not in theirs:
        return max((differ(ours[k], theirs[k]) for k in theirs), default=0.0)
    scale = theirs.get("norm", theirs.get("rms"))
    return max(abs(ours[k] - theirs[k]) / (theirs[k] if k != "mean" else scale) for k in theirs)


def plain(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same of the straight-line program's first step, from what plain hooks and gradients say."""
    outputs: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    names: dict[Tensor, tuple[str, str]] = {}
    gradients: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    build, update = reference.build, reference.adamw

    def watched(raw: Any) -> Any:
        nets = build(raw)
        for m, net in nets.items():
            for path, sub in net.named_modules():
                if LAYER.fullmatch(path):
                    sub.register_forward_hook(lambda *x, key=(m, path): outputs[key].append(x[2].flatten()))
            for name, param in net.named_parameters():
                found = LAYER.match(name)
                names[param] = m, found[0] if found else name.split(".")[0]
        return nets

    def adamw(p: Tensor, *args: Any) -> None:
        assert p.grad is not None
        gradients[names[p]].append(p.grad.flatten().clone())
        update(p, *args)

    monkeypatch.setattr(reference, "build", watched)
    monkeypatch.setattr(reference, "adamw", adamw)
    reference.train(raw, 1)
    expected: dict[str, Any] = defaultdict(dict)
    for (m, place), found in gradients.items():
        g = torch.cat(found)
        x = torch.cat(outputs[m, place]).detach() if (m, place) in outputs else None
        output: dict[str, Any] = {}
        if x is not None:
            output = {"mean": x.mean(), "rms": x.square().mean().sqrt(), "max": x.abs().max()}
            output["elements"] = x.numel()
        expected[m][place] = {
            "gradient": {"norm": float(g.norm()), "max": float(g.abs().max())},
            "output": {k: float(v) for k, v in output.items()} or None,
        }
    return expected


def test_layers_are_those_of_plain_hooks(monkeypatch: pytest.MonkeyPatch, alone: Any) -> None:
    raw = small(train={**TRAIN, "clip": 0.0, "statistics": 1, "global_batch": 3})
    raw["data"]["train"] = [str(CONFIGS / "data" / "digits-train-000000.tar")]
    raw["model"]["llm"] |= {"mtp_layers": 2, "tied": True}
    expected = plain(raw, monkeypatch)
    raw["schedule"] = {"microbatches": 2}
    (found,) = alone(1, layers, raw, 1)
    kinds = {place: one.pop("kind") for place, one in found[0]["llm"].items()}
    assert kinds["layers.0"] == "Mamba" and kinds["mtp.layers.1"] == "MoE" and kinds["embed"] == ""
    assert {one.pop("kind") for m in ("vision", "audio") for one in found[0][m].values()} == {"", "Block"}
    assert differ(found[0], expected) < 1e-9


@pytest.mark.parametrize("name", on_demand(LAYOUTS, LAYOUTS))
def test_layers_are_the_same_in_any_layout(name: str, ranks: Any, alone: Any) -> None:
    world, layout, schedule, train = LAYOUTS[name]
    raw = config()
    (expected,) = alone(1, layers, raw, 2)
    assert expected[0] == {} and expected[1]["vision"]["encoder.blocks.0"]["gradient"] is None
    raw |= {"layout": layout, "schedule": schedule}
    raw["train"] |= train
    for found in ranks(world, layers, raw, 2):
        assert found[0] == {}
        assert differ(found[1], expected[1]) < 1e-9
