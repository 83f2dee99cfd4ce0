"""Of the built-in encoders Muon updates linear maps alone: no tables, no tokens, no taps of convolutions."""

from __future__ import annotations

import pytest

from encoders.registry import resolve
from parallel.sharding.muon import is_matrix
from parallel.sharding.param import declared
from parallel.topology.axis import Axes

NAMES = (
    *("vit", "fastconformer", "siglip", "siglip2", "clip", "image_vit", "dinov2", "dinov3", "radio"),
    *("qwen2_5_vl", "qwen3_vl", "whisper", "wav2vec2", "parakeet"),
)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_are_linear_maps(name: str) -> None:
    cls = resolve(name)
    encoder = cls(cls.Config(), Axes(), device="meta", dtype=None)  # type: ignore[call-arg]
    trained = [(full, p, spec) for full, p, spec in declared(encoder) if spec.trained]
    found = {full: tuple(p.shape) for full, p, spec in trained if is_matrix(spec, p.ndim)}
    assert len(found) > 4
    for full, shape in found.items():
        assert "position" not in full and (min(shape) >= 32 or full == "patch.weight"), (full, shape)
