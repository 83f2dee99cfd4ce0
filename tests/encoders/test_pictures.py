"""Pictures become the patches that transformers' image processors make, and refusals are in words."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import encoders
from encoders.hf import open_folder
from encoders.hf.processor import dense_batch, packed_batch
from encoders.vision.config import Pictures
from encoders.vision.sizes import fitted
from tests.encoders import published
from tests.encoders.helpers import png
from tests.encoders.media.test_pictures import made, saved

from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil  # isort: skip
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # isort: skip
from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor  # isort: skip
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil  # isort: skip
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil  # isort: skip
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # isort: skip
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # isort: skip
from transformers.models.siglip2.image_processing_siglip2 import (  # isort: skip
    get_image_size_for_max_num_patches,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # isort: skip
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil  # isort: skip
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # isort: skip

SQUARE = {"height": 16, "width": 16}
PROCESSORS: dict[str, Any] = {
    "siglip": lambda: SiglipImageProcessorPil(size=SQUARE),
    "siglip2": lambda: Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20),
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 19}, crop_size=SQUARE),
    "image_vit": lambda: ViTImageProcessorPil(size=SQUARE),
    "dinov2": lambda: BitImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=SQUARE, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ),
    "dinov3": lambda: DINOv3ViTImageProcessor(size=SQUARE),
    "internvl": lambda: GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
    "pixtral": lambda: PixtralImageProcessorPil(
        patch_size={"height": 4, "width": 4}, size={"longest_edge": 40}
    ),
    "qwen2_5_vl": lambda: Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 300, "longest_edge": 2000}
    ),
    "qwen3_vl": lambda: Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 900}
    ),
}


def processed(name: str, cfg: Any, image: Image.Image) -> Tensor:
    """The processor's patches, in the order of our tokens."""
    found = PROCESSORS[name]()(images=[image], return_tensors="pt")
    pixels: Tensor = found["pixel_values"]
    if name == "siglip2":
        return pixels[0, : int(found["spatial_shapes"][0].prod())]
    if name == "pixtral":
        height, width = found["image_sizes"][0].tolist()
        pixels = pixels[:, :, :height, :width]
    if "image_grid_thw" in found:
        return packed_batch(pixels, found["image_grid_thw"].tolist()).values
    return dense_batch(cfg, pixels).values


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    """From a folder's own settings, for colour, grey and JPEG, larger and smaller than wanted."""
    folder = published.saved(published.oracle(name, torch.float32), tmp_path)
    PROCESSORS[name]().save_pretrained(folder)
    opened = open_folder(folder)
    for i, size in enumerate([(31, 50), (16, 16), (57, 20), (9, 12)]):
        payload = png(*size, seed=i, mode="L" if i == 3 else "RGB")
        if i == 2:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(payload)).save(buffer, "JPEG")
            payload = buffer.getvalue()
        meta = {"height": size[0], "width": size[1], "channels": 3}
        patches = opened.cls.prepare(opened.cfg, payload, meta)
        expected = processed(name, opened.cfg, Image.open(io.BytesIO(payload)).convert("RGB"))
        assert len(patches) == opened.cls.input_count(opened.cfg, meta)
        assert patches.shape == expected.shape
        assert float((patches - expected).abs().max()) <= 1e-5, (name, size)


@pytest.mark.parametrize("name", ["siglip", "clip", "qwen2_5_vl", "pixtral"])
def test_any_kind_of_picture_is_resized_as_the_processor_does_it(name: str, tmp_path: Path) -> None:
    """The processor takes the opened file as it is; 16-bit grey, which it would clip, as 8-bit grey."""
    folder = published.saved(published.oracle(name, torch.float32), tmp_path)
    PROCESSORS[name]().save_pretrained(folder)
    opened = open_folder(folder)
    for mode in ("RGBA", "LA", "P", "1", "CMYK", "I;16"):
        payload = saved(made(mode, 31, 50), "TIFF")
        image = Image.open(io.BytesIO(payload))
        if mode == "I;16":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        patches = opened.cls.prepare(opened.cfg, payload, {"height": 31, "width": 50, "channels": 3})
        assert float((patches - processed(name, opened.cfg, image)).abs().max()) <= 1e-5, mode


SIDE = st.integers(1, 900)


@settings(deadline=None, max_examples=60)
@given(SIDE, SIDE, st.integers(1, 40), st.integers(1, 300))
def test_sizes_are_those_of_the_processors(height: int, width: int, least: int, most: int) -> None:
    side, least, most = 8, 64 * least, 64 * (least + most)
    cfg = encoders.resolve("qwen2_5_vl").Config(patch=4, pictures=Pictures("smart", least=least, most=most))
    if max(height, width) <= 200 * min(height, width):
        assert fitted(cfg, height, width) == smart_resize(height, width, side, least, most)
    cfg = encoders.resolve("siglip2").Config(patch=4, pictures=Pictures("patches", most=most))
    assert fitted(cfg, height, width) == get_image_size_for_max_num_patches(height, width, 4, most)


def test_pictures_that_cannot_be_taken_are_named() -> None:
    cls = encoders.resolve("qwen3_vl")
    cfg = cls.Config()
    with pytest.raises(
        ValueError, match=r"a picture of 1x20000 pixels; needed: a longer side of at most 200"
    ):
        cls.rows(cfg, {"height": 1, "width": 20000})
    with pytest.raises(ValueError, match="a picture of 0x4 pixels; needed: one at least on each side"):
        cls.rows(cfg, {"height": 0, "width": 4})
    native = encoders.resolve("dinov3")
    with pytest.raises(ValueError, match="a picture of 8x99 pixels is 8x99 to the encoder; needed: 16 at"):
        native.rows(native.Config(pictures=Pictures("none")), {"height": 8, "width": 99})
    siglip = encoders.resolve("siglip")
    with pytest.raises(ValueError, match="pictures are 27x27 patches, merge is 2; needed: a merge that"):
        siglip.check(siglip.Config(patch=14, merge=2, pictures=Pictures(height=384, width=384)), 1)
    with pytest.raises(ValueError, match=re.escape("image is (5, 6), its index says 6x5")):
        siglip.prepare(siglip.Config(), png(5, 6, mode="RGB"), {"height": 6, "width": 5})


def test_what_is_left_over_of_a_patch_is_dropped() -> None:
    """As a convolution without padding does it: 384 pixels of patches of 14 are 27."""
    cls = encoders.resolve("siglip")
    cfg = cls.Config(patch=14, table=27, pictures=Pictures(height=384, width=384))
    meta = {"height": 384, "width": 384}
    assert cls.rows(cfg, meta) == 729
    patches = cls.prepare(cfg, png(384, 384, mode="RGB"), meta)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png(384, 384, mode="RGB"))))).permute(2, 0, 1)
    last = pixels[:, 26 * 14 : 27 * 14, 26 * 14 : 27 * 14].float() / 127.5 - 1.0
    assert torch.allclose(patches[-1], last.flatten(), atol=1e-6)
