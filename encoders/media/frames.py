"""Videos as frames: animated pictures (GIF, WebP), and tars of pictures in the order of their names.

A tar may hold a file called `fps` with its frames a second. Films in containers are in films.py.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from encoders.media.errors import readable
from encoders.media.limits import BOUNDS
from encoders.media.pictures import open_picture, picture, picture_channels, plain, planes, probe_picture


class Frames(NamedTuple):
    """Sizes of a video: fps is None where it does not say how many frames a second it has."""

    height: int
    width: int
    channels: int
    pictures: int
    fps: float | None

    @property
    def meta(self) -> dict[str, Any]:
        """As an item's metadata; one frame alone is a still picture."""
        out: dict[str, Any] = {"height": self.height, "width": self.width, "channels": self.channels}
        if self.pictures == 1:
            return out
        return {**out, "pictures": self.pictures, **({} if self.fps is None else {"fps": self.fps})}


def probe_animation(payload: bytes) -> Frames:
    """Sizes of an animated picture. Each frame is decoded, for WebP says its duration only then; none is
    kept. O(pixels of all frames). Raises ValueError where it cannot be decoded and beyond BOUNDS."""
    from PIL import ImageSequence

    with open_picture(payload) as image, readable("the animation"):
        n = getattr(image, "n_frames", 1)
        BOUNDS.check({"pictures": n})
        if n == 1:
            return Frames(**probe_picture(payload), pictures=1, fps=None)
        milliseconds, channels = 0.0, 1
        for frame in ImageSequence.Iterator(image):
            frame.load()
            milliseconds += frame.info.get("duration", 0)
            channels = max(channels, picture_channels(frame))
        fps = 1000 * n / milliseconds if milliseconds else None
        return Frames(image.height, image.width, channels, n, fps)


def probe_tar(payload: bytes) -> Frames:
    """Sizes of a tar of pictures. Raises ValueError for one without, and for pictures of several sizes."""
    frames, fps = _open_tar(payload)
    BOUNDS.check({"pictures": len(frames)})
    found = [probe_picture(frame) for frame in frames]
    sizes = {(meta["height"], meta["width"]) for meta in found}
    if len(sizes) != 1:
        raise ValueError(f"frames of {len(sizes)} sizes; needed: one frame at least, all of one size")
    height, width = sizes.pop()
    return Frames(height, width, max(meta["channels"] for meta in found), len(found), fps)


def _open_tar(payload: bytes) -> tuple[list[bytes], float | None]:
    """The files of the frames, and the frames a second that the tar says."""
    frames: list[tuple[str, bytes]] = []
    fps: float | None = None
    with readable("the tar of frames"), tarfile.open(fileobj=io.BytesIO(payload), mode="r:") as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            if file is not None and member.name.rpartition("/")[2] == "fps":
                fps = float(file.read())
            elif file is not None:
                frames.append((member.name, file.read()))
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"its file fps says {fps}; needed: a number above 0")
    return [data for _, data in sorted(frames)], fps


def tar_frames(payload: bytes, numbers: Sequence[int], channels: int) -> Iterator[Tensor]:
    """The frames with these numbers: uint8 [channels, height, width] each."""
    frames, _ = _open_tar(payload)
    check_numbers(numbers, len(frames))
    for n in numbers:
        yield planes(picture(frames[n]), channels)


def animation_frames(payload: bytes, numbers: Sequence[int], channels: int) -> Iterator[Tensor]:
    """As tar_frames(); numbers do not fall. Frames are decoded in order, up to the last that is asked for."""
    with open_picture(payload) as image, readable("the animation"):
        check_numbers(numbers, getattr(image, "n_frames", 1))
        for n in numbers:
            image.seek(n)
            image.load()
            yield planes(plain(image), channels)


def check_numbers(numbers: Sequence[int], count: int) -> None:
    """Raise ValueError where a video has too few frames."""
    if max(numbers) >= count:
        raise ValueError(f"a video of {count} frames, its index says {max(numbers) + 1} at least")
