"""Still pictures: sizes from the header, and pixels, upright, opaque and of 8 bits a channel.

Pixels are those of transformers' load_image() and of its processors' convert_to_rgb(), with Pillow: EXIF
orientation is applied, transparency is laid on white. Of 16 bits a channel the upper 8 are taken, where
Pillow's conversion of 16-bit grey would clip all above 255 to white.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.media.errors import readable
from encoders.media.kinds import described
from encoders.media.limits import BOUNDS

# Not all of Pillow's: some of its readers run other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
LATE = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # PNG chunks that may follow the pixels


def open_picture(payload: bytes) -> Any:
    """A picture as Pillow opens it, nothing decoded. Raises ValueError for what is none of FORMATS and for
    more pixels than BOUNDS."""
    from PIL import Image, UnidentifiedImageError

    with readable("its header"):
        try:
            image = Image.open(io.BytesIO(payload), formats=FORMATS)
        except UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise ValueError(f"cannot identify image: {described(payload)}; needed: one of {known}") from None
        BOUNDS.check({"height": image.height, "width": image.width})
        if min(image.size) < 1:
            raise ValueError(f"a picture of {image.height}x{image.width} pixels")
    return image


def picture_channels(image: Any) -> int:
    """Channels of an opened PIL image: 1 (grey, also as a palette or with alpha) or 3 (colour).

    Raises ValueError for pixels whose black and white no file states: whole numbers of 32 bits and floats.
    """
    if image.mode in ("P", "PA"):
        shades = image.getpalette("RGB")
        return 1 if shades[0::3] == shades[1::3] == shades[2::3] else 3
    if image.mode in GREY or image.mode.startswith("I;16"):
        return 1
    if image.mode not in COLOUR:
        raise ValueError(f"pixels of Pillow's mode {image.mode}; needed: grey or colour of 8 or 16 bits")
    return 3


def probe_picture(payload: bytes) -> dict[str, int]:
    """height and width of the upright picture, and channels, from its header."""
    with open_picture(payload) as image, readable("its header"):
        channels = picture_channels(image)
        turned = image.format != "TIFF" and _orientation(image, payload) in TURNED  # Pillow turns TIFFs
        height, width = image.size if turned else reversed(image.size)
    return {"height": height, "width": width, "channels": channels}


def _orientation(image: Any, payload: bytes) -> int:
    """The EXIF orientation, 1 where there is none that can be read."""
    if image.format == "PNG" and not any(mark in payload for mark in LATE):
        return 1  # Pillow would decode the pixels to look behind them
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF raises errors of many kinds
        return 1


def picture(payload: bytes) -> Any:
    """A picture's file as an upright PIL image of mode L (grey) or RGB. Raises ValueError where it cannot be
    decoded."""
    with open_picture(payload) as image, readable("the picture"):
        image.load()
        return plain(_upright(image, _orientation(image, payload)))


def _upright(image: Any, orientation: int) -> Any:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def plain(image: Any) -> Any:
    """An opened PIL image as mode L (grey) or RGB, what is transparent laid on white."""
    from PIL import Image

    mode = "L" if picture_channels(image) == 1 else "RGB"
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over)
        image = image.convert("RGB")
    return image.convert(mode)


def check_channels(held: int, channels: int) -> None:
    """Raise ValueError where a picture has more channels (`held`) than an encoder takes (`channels`): its
    colours would be lost. A grey picture fits an encoder for colour: its three channels are equal."""
    if held > channels:
        raise ValueError(
            f"a colour picture, of {held} channels (RGB), where the option channels is {channels} (grey), so "
            f"that its colours would be lost; needed: channels={held}, which takes grey pictures too, or "
            "pictures saved in grey"
        )


def decode_picture(payload: bytes, channels: int) -> Tensor:
    """A picture's file to uint8 [channels, height, width]; channels: 1 (grey) or 3 (RGB).

    A grey picture may become RGB; for the reverse it raises ValueError, as for one that cannot be decoded.
    """
    return planes(picture(payload), channels)


def planes(image: Any, channels: int) -> Tensor:
    """A PIL image of mode L or RGB as uint8 [channels, height, width]. Raises ValueError as check_channels()
    does."""
    check_channels(len(image.getbands()), channels)
    as_asked = channels == 1 or image.mode == "RGB"  # to convert what is RGB copies it
    return image_tensor(np.asarray(image if as_asked else image.convert("RGB")))


def image_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [height, width] or [height, width, channels] to uint8 [channels, height, width]."""
    out = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.array(out, order="C"))  # a copy: decoded pixels are read-only


def rectangle(rows: int, most: int | None = None) -> tuple[int, int]:
    """Rows down and across of a picture of `rows` rows, at most four times as wide as high.

    The largest square of at most so many where there is none. most: of either side.
    """
    root = max(1, math.isqrt(rows))
    down = next((n for n in range(root, root // 2, -1) if rows % n == 0), 0)
    across = rows // down if down else root
    if most is not None and across > most:
        across = down = min(root, most)
    return down or root, across
