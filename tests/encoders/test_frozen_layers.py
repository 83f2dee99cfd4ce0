"""Encoders whose first layers are not trained: gradients of the rest, and what is kept for a backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.module import EncoderModule
from mm.config.schema import from_mapping
from mm.config.stages import stages_of
from mm.errors import Refused
from mm.plan.blueprint import check_outline, draw_up
from mm.plan.trained import step_factors, trained_below, trained_share
from parallel.topology.stage import partition_layers
from tests.encoders.helpers import SMALL, batch, module
from tests.mm.harness import CONFIGS, small

NAMES = [n for n in SMALL if n not in ("siglip2", "radio")]


NEAR = {"rtol": 1e-9, "atol": 1e-10}


def layer_of(name: str) -> int:
    """The layer of a parameter; -1 before the layers, 99 after them."""
    for part in ("blocks.", "layers."):
        if part in name:
            return int(name.partition(part)[2].partition(".")[0])
    late = ("projector", "encoder.norm", "merger", "final")
    return 99 if any(word in name for word in late) else -1


def sizes_of(name: str) -> list[Any]:
    sounds = ("fastconformer", "whisper", "wav2vec2", "parakeet", "audioflamingo3")
    return [3000, 2000] if name in sounds else [(8, 8), (4, 12)]


def kept(net: EncoderModule, name: str) -> tuple[int, torch.Tensor]:
    """Bytes that a forward keeps for the backward, weights aside, and its values."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    items = batch(name, sizes_of(name))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        values = net(items).values
    return sum(held.values()), values


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(NAMES), layers=st.integers(1, 4), frozen=st.integers(0, 4), again=st.booleans())
def test_the_rest_learns_as_if_all_did(name: str, layers: int, frozen: int, again: bool) -> None:
    frozen = min(frozen, layers)
    more: dict[str, Any] = {"layers": layers}
    if "full_layers" in SMALL[name]:
        more["full_layers"] = (0,)
    part, alone = module(name, **more), module(name, **more)
    alone.freeze("none")  # some weights, such as Whisper's positions, are never trained
    part.freeze("none", frozen)
    part.encoder.recompute = again
    (few, found), (many, expected) = kept(part, name), kept(alone, name)
    for values in (found, expected):
        values.square().sum().backward()
    torch.testing.assert_close(found, expected, **NEAR)  # kernels differ with and without a gradient
    for (key, p), q in zip(part.named_parameters(), alone.parameters(), strict=True):
        low = frozen > 0 and layer_of(key) < frozen
        assert p.requires_grad is (q.requires_grad and not low), key
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, **NEAR)
        else:
            assert p.grad is None, key
    if frozen and not again:
        # Blocks are alike, so each frozen one keeps its share less.
        assert few < many * (1 - 0.5 * frozen / layers)


def test_a_pipeline_asks_for_no_gradient_below_the_lowest_trained_layer() -> None:
    raw = small(layout={"vision": {"ranks": "0-3", "pp": 4}})
    raw["model"]["vision"]["options"] |= {"layers": 8}
    for frozen, shares, below in (
        (0, [1, 1, 1, 1], [True, True, True]),
        (3, [0, 0.5, 1, 1], [False, True, True]),
        (8, [0, 0, 0, 0], [False, False, False]),
    ):
        raw["model"]["vision"]["freeze_layers"] = frozen
        plan = draw_up(from_mapping(raw, CONFIGS), 4)
        stages = plan.stages["vision"]
        assert [len(s.layers) for s in stages] == [2, 2, 2, 2]
        assert [trained_share(plan, "vision", s) for s in stages] == shares
        assert [trained_below(plan, "vision", k) for k in (1, 2, 3)] == below
        assert step_factors(plan, "vision") == (1 + 2 * (8 - frozen) / 8, 3 if frozen < 8 else 2)


def test_a_stage_of_a_pipeline_has_its_own_of_the_first_layers() -> None:
    stages = partition_layers([1.0] * 4, 2)
    nets = [module("vit", stage=stage, layers=4) for stage in stages]
    for net in nets:
        net.freeze("none", 3)
    trained = [{layer_of(k) for k, p in net.named_parameters() if p.requires_grad} for net in nets]
    assert trained == [set(), {3, 99}]


def config(**vision: Any) -> Any:
    raw = small()
    raw["model"]["vision"] |= vision
    return from_mapping(raw, CONFIGS)


def test_frozen_layers_without_a_meaning_are_refused() -> None:
    with pytest.raises(
        Refused, match=r"freeze_layers is 9, but the encoder has \d layers; needed: \d at most"
    ):
        draw_up(config(freeze_layers=9), 4)
    with pytest.raises(Refused, match=r"would have no effect: .*nearest: .*freeze_layers=0"):
        check_outline(config(freeze_layers=1, freeze="encoder"), 4)
    with pytest.raises(Refused, match="freeze_layers"):
        config(freeze_layers=-1)


def test_a_stage_may_freeze_other_layers() -> None:
    raw = small()
    del raw["train"]["steps"]
    raw["model"]["vision"]["freeze_layers"] = 1
    raw["stages"] = [
        {"name": "a", "steps": 1, "train": ["vision.projector"]},
        {"name": "b", "steps": 1, "train": ["vision", "llm"]},
        {"name": "c", "steps": 1, "freeze_layers": {"vision": 2}},
    ]
    found = [s.cfg.model["vision"] for s in stages_of(from_mapping(raw, CONFIGS))]
    assert [(v.freeze, v.freeze_layers) for v in found] == [("encoder", 0), ("none", 1), ("none", 2)]
    for wrong, words in (({"visoin": 1}, "did you mean vision"), (3, "needed: a mapping")):
        raw["stages"][2]["freeze_layers"] = wrong
        with pytest.raises(Refused, match=words):
            stages_of(from_mapping(raw, CONFIGS))
