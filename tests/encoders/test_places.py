"""Items that are prepared at their place in a batch are those that are prepared and copied there."""

from __future__ import annotations

import pytest
import torch

import encoders
from encoders.contract import pack_items
from tests.encoders.helpers import SMALL, VISION, item, png


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_item_is_the_same_at_its_place(name: str, dtype: torch.dtype) -> None:
    cls = encoders.resolve(name)
    cfg = cls.Config(**SMALL[name])
    payload, meta = item(name, (8, 12) if name == "vit" or name in VISION else 1600, 1)
    made = cls.prepare(cfg, payload, meta)
    expected = pack_items(cls, cfg, [made], [meta], device="cpu", dtype=dtype).values
    n = cls.input_count(cfg, meta)
    whole = torch.full((n + 4, *cls.input_shape(cfg)), 7.0).to(expected.dtype)
    out = whole[2 : n + 2]
    assert cls.prepare_into(cfg, payload, meta, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    assert bool((whole[:2] == 7).all()) and bool((whole[n + 2 :] == 7).all())
    for other in (whole[:1], whole):  # a place of another number stays as it is
        before = other.clone()
        assert torch.equal(cls.prepare_into(cfg, payload, meta, other).to(expected.dtype), expected)
        assert torch.equal(other, before)


@pytest.mark.parametrize("fit", ["exact", "tiles"])
def test_pictures_that_are_resized_are_the_same_at_their_places(fit: str) -> None:
    cls = encoders.resolve("internvl")
    given = {**SMALL["internvl"], "channels": 3}
    how = type(given["pictures"])(fit, height=8, width=8, most=4)
    cfg = cls.Config(**{**given, "pictures": how})
    whole = {"height": 12, "width": 26, "channels": 3}
    for meta in (piece for piece in cls.pieces(cfg, whole) if not isinstance(piece, str)):
        expected = cls.prepare(cfg, png(12, 26, mode="RGB"), meta)
        out = torch.empty(cls.input_count(cfg, meta), *cls.input_shape(cfg))
        assert cls.prepare_into(cfg, png(12, 26, mode="RGB"), meta, out) is out
        assert torch.equal(out, expected)
