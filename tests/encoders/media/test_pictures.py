"""Pictures of every format: sizes known before decoding, pixels as Pillow and transformers give them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders.media.decode import decode_still
from encoders.media.limits import BOUNDS, Limits
from encoders.media.pictures import picture
from encoders.media.probe import probe_media
from mm.config.data import LimitsConfig
from mm.data.probes import metadata

import tests.llm.oracle  # noqa: F401  isort: skip
from transformers.image_transforms import convert_to_rgb  # isort: skip
from transformers.image_utils import load_image  # isort: skip

EXACT: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
    "GIF": {},
}
LOSSY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "AVIF": {}}
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "LAB"),
    "GIF": ("L", "P"),
    "JPEG": ("L", "RGB", "CMYK"),
    "AVIF": ("RGB", "RGBA"),
}


def made(mode: str, height: int = 9, width: int = 14) -> Image.Image:
    """A picture whose pixels all differ, with all degrees of transparency."""
    rng = np.random.default_rng(height)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.convert("RGB").tobytes())
    return image if mode == "RGBA" else image.convert("RGB" if mode == "CMYK" else mode).convert(mode)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **{**EXACT.get(form, LOSSY.get(form, {})), **options})
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "mode"), [(f, m) for f, modes in MODES.items() for m in modes])
def test_pixels_are_those_of_the_processors(form: str, mode: str) -> None:
    payload = saved(made(mode), form)
    if mode == "LAB":
        with pytest.raises(ValueError, match="Pillow's mode LAB; needed: grey or colour"):
            probe_media(payload)
        return
    meta = probe_media(payload)
    ours = decode_still(payload, 3).permute(1, 2, 0).numpy()
    theirs: Any = convert_to_rgb(Image.open(io.BytesIO(payload)), return_numpy=True)
    if mode == "I;16":  # there all above 255 would be white
        theirs = np.repeat((np.asarray(made(mode)) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(ours, theirs)
    assert (meta["height"], meta["width"]) == (9, 14) == ours.shape[:2]
    grey = np.array_equal(ours[..., 0], ours[..., 1]) and np.array_equal(ours[..., 1], ours[..., 2])
    assert meta["channels"] == (1 if grey else 3)
    if meta["channels"] == 1:
        assert np.array_equal(decode_still(payload, 1)[0].numpy(), ours[..., 0])


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF compressed", "AVIF", "PNG late", "PNG xmp"]
)
def test_every_orientation_is_upright_and_known_before_decoding(form: str) -> None:
    """Against transformers' load_image()."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        kind, _, how = form.partition(" ")
        options: dict[str, Any] = {"compression": "tiff_lzw"} if how == "compressed" else {}
        options |= {"exif": exif} if how != "xmp" else {}
        payload = saved(made("RGB"), kind, **options)
        if how == "late":
            payload = _exif_last(payload)
        if how == "xmp":
            payload = _chunk_last(payload, b"iTXt", _xmp(orientation))
        theirs = np.asarray(load_image(_data_url(payload)))
        ours = decode_still(payload, 3).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, theirs), orientation
        meta = probe_media(payload)
        assert (meta["height"], meta["width"]) == theirs.shape[:2], orientation
        assert (meta["height"] == 14) == (orientation >= 5)


def _data_url(payload: bytes) -> str:
    import base64

    return "data:image/x," + base64.b64encode(payload).decode()


def _xmp(orientation: int) -> bytes:
    text = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    return b"XML:com.adobe.xmp\0\0\0\0\0" + text.encode()


def _exif_last(png: bytes) -> bytes:
    """The eXIf chunk moved behind the pixels, as some programs write it."""
    at = png.index(b"eXIf") - 4
    n = struct.unpack(">I", png[at : at + 4])[0] + 12
    return png[:at] + png[at + n : -12] + png[at : at + n] + png[-12:]


def _chunk_last(png: bytes, kind: bytes, body: bytes) -> bytes:
    sum_ = struct.pack(">I", zlib.crc32(kind + body))
    return png[:-12] + struct.pack(">I", len(body)) + kind + body + sum_ + png[-12:]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing() -> None:
    payload = saved(made("RGB"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert probe_media(payload) == {"height": 9, "width": 14, "channels": 3}
    assert decode_still(payload, 3).shape == (3, 9, 14)


def test_sixteen_bits_keep_their_upper_half() -> None:
    shades = np.array([[0, 255, 256, 40000, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        for channels in (1, 3):
            for plane in decode_still(saved(Image.fromarray(shades), form), channels):
                assert plane.tolist() == [[0, 0, 1, 156, 255]]
    rgb = np.stack([shades, shades, shades[:, ::-1]], axis=2)  # Pillow cannot write these
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    head = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 1, 16, 2, 0, 0, 0))
    payload = head + _png_chunk(b"IDAT", zlib.compress(rows)) + _png_chunk(b"IEND", b"")
    assert probe_media(payload) == {"height": 1, "width": 5, "channels": 3}
    found = [plane.tolist() for plane in decode_still(payload, 3)]
    assert found == [[[0, 0, 1, 156, 255]], [[0, 0, 1, 156, 255]], [[255, 156, 1, 0, 0]]]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert decode_still(saved(image, "PNG"), 3)[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    assert decode_still(saved(palette, "PNG", transparency=0), 1).item() == 255
    keyed = Image.new("RGB", (1, 1), (7, 8, 9))
    assert decode_still(saved(keyed, "PNG", transparency=(7, 8, 9)), 3).flatten().tolist() == [255] * 3


def test_content_counts_and_not_the_extension() -> None:
    for extension in ("jpg", "png", "gif", "webp", "tiff"):
        assert metadata(extension, saved(made("RGB"), "PNG")) == {"height": 9, "width": 14, "channels": 3}
    for payload in (b"", b"\0" * 300, b"<html>"):
        with pytest.raises(ValueError, match="no picture, sound or video that is known"):
            metadata("jpg", payload)


def bomb(height: int, width: int) -> bytes:
    """A PNG of few bytes whose header promises this size."""
    head = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + _png_chunk(b"IDAT", zlib.compress(bytes(100)))
        + _png_chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"data.limits.pixels=89478485|DecompressionBombError"):
        probe_media(bomb(*size))
    with pytest.raises(ValueError, match=r"data.limits.pixels=89478485|DecompressionBombError"):
        picture(bomb(*size))


def test_limits_name_what_is_larger() -> None:
    limits = Limits(pixels=100, frames=5, samples=1000, bytes=10)
    limits.check({"height": 10, "width": 10, "pictures": 5}, 10)
    for meta, size, word in (
        ({"height": 11, "width": 10}, 0, "11x10 pixels are 110, more than data.limits.pixels=100"),
        ({"height": 1, "width": 1, "pictures": 6}, 0, "it has 6 frames, more than data.limits.frames=5"),
        ({"samples": 1001, "rate": 8}, 0, "it has 1001 samples"),
        ({}, 11, "it has 11 bytes"),
    ):
        with pytest.raises(ValueError, match=word):
            limits.check(meta, size)


def test_the_config_bounds_what_probes_take() -> None:
    assert Limits(**LimitsConfig().model_dump()) == BOUNDS
    for name, field in LimitsConfig.model_fields.items():
        assert [m.le for m in field.metadata if hasattr(m, "le")] == [getattr(BOUNDS, name)]
