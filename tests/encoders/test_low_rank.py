"""Low-rank adapters of encoders: every linear map of every family can have one, and uses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from encoders.hf import load_hf
from parallel.sharding.low_rank import ALL, LowRank, adapters_of, add_adapters, is_adapter
from tests.encoders import published, speech
from tests.encoders.test_audio import inputs_of
from tests.parallel.sharding.test_low_rank import merge
from tests.slow import on_demand


def published_encoder(family: str, folder: Path) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A published encoder, small and random, and its features of some inputs."""
    if family in speech.FAMILIES:
        made = speech.model(family, 3)
        net = load_hf(speech.folder(made, folder), torch.float64)
        given: Any = inputs_of(made, 3)
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    else:
        made = published.oracle(family, torch.float64, 3)
        net = load_hf(published.saved(made, folder))
        given = next(iter(published.inputs(family, made, dtype=torch.float64)))
    return net, lambda net: net.features(given)  # type: ignore[operator,no-any-return]


ENCODERS = ["parakeet", "qwen2_5_vl", "qwen3_vl", "siglip", "whisper", "wav2vec2", "dinov3_gated", "radio"]


@pytest.mark.parametrize("family", on_demand(ENCODERS, ENCODERS[2:]))
def test_every_linear_map_of_an_encoder_can_have_one(family: str, tmp_path: Path) -> None:
    """Features are those of the merged weights, and no matrix of a layer is passed over."""
    (model, features), (plain, _) = (published_encoder(family, tmp_path / x) for x in "ab")
    model.requires_grad_(False)
    add_adapters(model.encoder, LowRank(2, 6.0, [ALL]))
    own = dict(model.named_parameters())
    left = {n for n, p in own.items() if p.ndim == 2 and not is_adapter(n) and adapters_of(n)[0] not in own}
    known = ("position", "class_token", "registers", "depth", "to_content", "to_distance")
    assert all(name.rpartition(".")[2] in known for name in left), left
    merge(model, plain, 3.0)
    ours, theirs = features(model), features(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.square().sum().backward()
    # Features are those before rows are merged.
    used = {n: p.grad for n, p in own.items() if is_adapter(n) and "merger" not in n}
    silent = [n for n, grad in used.items() if grad is None or not grad.any()]
    assert not silent, silent
