"""Tiles and budgets of patches are those of the processors of InternVL and Nemotron Omni."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import encoders
from encoders.contract import Meta
from encoders.vision.config import Pictures
from encoders.vision.sizes import fitted, tiling
from tests.encoders.helpers import png

import tests.llm.oracle  # noqa: F401  isort: skip
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas  # isort: skip
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil  # isort: skip
from transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni import (  # isort: skip
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    get_patch_grid_size,
)

CLS: Any = encoders.resolve("siglip")
TILED = CLS.Config(
    patch=4,
    table=4,
    pictures=Pictures("tiles", 16, 16, most=6, tile_tag="<tile_{n}>", thumbnail_tag="<thumb {row}x{column}>"),
)
RADIO: Any = encoders.resolve("radio")
OMNI = RADIO.Config(patch=4, merge=2, pictures=Pictures("budget", least=40, most=200, after_scale=True))
SIDE = st.integers(1, 2500)


@settings(max_examples=80, deadline=None)
@given(
    height=SIDE, width=SIDE, least=st.integers(1, 4), more=st.integers(0, 12), tile=st.sampled_from([16, 448])
)
@example(height=1, width=20000, least=1, more=11, tile=448)
@example(height=448, width=448, least=1, more=11, tile=448)
def test_the_grid_of_tiles_is_internvls(height: int, width: int, least: int, more: int, tile: int) -> None:
    found = tiling(Pictures("tiles", tile, tile, least=least, most=least + more), height, width)
    columns, rows = get_optimal_tiled_canvas((height, width), (tile, tile), least, least + more)
    assert (found.down, found.across) == (rows, columns)
    assert found.tiles == rows * columns + (rows * columns > 1)


@settings(max_examples=80, deadline=None)
@given(height=SIDE, width=SIDE, merge=st.integers(1, 3), least=st.integers(1, 99), most=st.integers(9, 4000))
@example(height=1, width=20000, merge=2, least=1024, most=13312)
@example(height=4000, width=3000, merge=2, least=1024, most=13312)
def test_the_budget_of_patches_is_nemotrons(
    height: int, width: int, merge: int, least: int, most: int
) -> None:
    cfg = RADIO.Config(patch=4, merge=merge, pictures=Pictures("budget", least=least, most=max(least, most)))
    try:
        expected = get_patch_grid_size(height, width, 4, merge, least, max(least, most))
    except ZeroDivisionError:
        expected = (0, 0)
    if 0 in expected:
        with pytest.raises(ValueError, match="has no row of patches left"):
            fitted(cfg, height, width)
        return
    assert fitted(cfg, height, width) == tuple(4 * n for n in expected)


def tiles_of(cfg: Any, payload: bytes, meta: Meta) -> list[torch.Tensor]:
    found = [piece for piece in CLS.pieces(cfg, meta) if not isinstance(piece, str)]
    out = [CLS.prepare(cfg, payload, piece) for piece in found]
    assert [len(x) for x in out] == [CLS.rows(cfg, piece) for piece in found]
    return out


@pytest.mark.parametrize("size", [(16, 16), (31, 50), (9, 90), (50, 33), (200, 40), (1, 20000)], ids=str)
def test_pixels_of_tiles_are_the_processors(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16},
        crop_to_patches=True,
        max_patches=6,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    payload = png(*size, mode="RGB")
    with Image.open(io.BytesIO(payload)) as image:
        expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    found = tiles_of(TILED, payload, {"height": size[0], "width": size[1], "channels": 3})
    assert len(found) == len(expected)
    for tile, planes in zip(found, expected, strict=True):
        wanted = planes.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(16, -1)
        torch.testing.assert_close(tile, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (31, 50), (9, 90), (70, 66), (200, 120)], ids=str)
def test_pixels_of_a_budget_are_the_processors(size: tuple[int, int]) -> None:
    processor = NemotronH_Omni_Reasoning_V3ImageProcessor(
        patch_size=4, min_num_patches=40, max_num_patches=200, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    payload = png(*size, mode="RGB")
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(payload)))).permute(2, 0, 1)
    expected = processor(images=[pixels], return_tensors="pt")
    found = RADIO.prepare(OMNI, payload, {"height": size[0], "width": size[1], "channels": 3})
    down, across = expected["image_grid_hw"][0].tolist()
    assert RADIO.grid(OMNI, {"height": size[0], "width": size[1]}) == (1, down, across)
    ordered = (
        expected["pixel_values"]
        .view(down // 2, 2, across // 2, 2, -1)
        .transpose(1, 2)
        .reshape(down * across, -1)
    )
    torch.testing.assert_close(found, ordered, atol=1e-5, rtol=0)


def test_tags_stand_before_tiles() -> None:
    meta = {"height": 31, "width": 50, "channels": 3}
    tags = [piece for piece in CLS.pieces(TILED, meta) if isinstance(piece, str)]
    assert tags == [*(f"<tile_{n}>" for n in range(1, 7)), "<thumb 3x1>"]
    kinds = [isinstance(piece, str) for piece in CLS.pieces(TILED, meta)]
    assert kinds == [True, False] * 7
    small = {"height": 16, "width": 16, "channels": 3}
    assert CLS.pieces(TILED, small) == [{**small, "tile": 0}]
    bare = replace(TILED, pictures=replace(TILED.pictures, tile_tag="", thumbnail_tag="", thumbnail=False))
    assert [piece["tile"] for piece in CLS.pieces(bare, meta)] == list(range(6))  # type: ignore[index, call-overload]


def test_pictures_that_cannot_be_tiled_are_named() -> None:
    with pytest.raises(ValueError, match="a picture of 0x5 pixels; needed: one at least on each side"):
        CLS.pieces(TILED, {"height": 0, "width": 5, "channels": 3})
    with pytest.raises(ValueError, match="a picture of 7 tiles is so many items"):
        CLS.rows(TILED, {"height": 31, "width": 50, "channels": 3})
    with pytest.raises(ValueError, match=r"pictures.least is 3 and most 2"):
        CLS.check(replace(TILED, pictures=replace(TILED.pictures, least=3, most=2)), 1)
