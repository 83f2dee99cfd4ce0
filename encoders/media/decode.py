"""Decoding, by what a file is: a picture, frames of a video, a sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from encoders.media.films import film_frames
from encoders.media.frames import animation_frames, tar_frames
from encoders.media.kinds import described, kind_of
from encoders.media.pictures import decode_picture
from encoders.media.sounds import read_samples

FILMS = ("mp4", "matroska", "avi")


def decode_still(payload: bytes, channels: int) -> Tensor:
    """A picture, or the first frame of a video, as uint8 [channels, height, width].

    channels: 1 (grey) or 3 (RGB). Raises ValueError for colour where 1 is asked for, and for what cannot be
    decoded.
    """
    if kind_of(payload) in ("tar", *FILMS):
        return next(decode_frames(payload, [0], channels))
    return decode_picture(payload, channels)


def decode_frames(payload: bytes, numbers: Sequence[int], channels: int) -> Iterator[Tensor]:
    """The frames of a video with these numbers, which do not fall: uint8 [channels, height, width] each.

    Raises ValueError where there are fewer frames, and as decode_still() does.
    """
    kind = kind_of(payload)
    if kind == "tar":
        return tar_frames(payload, numbers, channels)
    if kind in ("animation", "picture"):
        return animation_frames(payload, numbers, channels)
    if kind is not None and kind in FILMS:
        return film_frames(payload, kind, numbers, channels)
    raise ValueError(f"no video that is known: {described(payload)}")


def read_sound(payload: bytes) -> tuple[Tensor, int]:
    """A sound as mono float32 samples [n], the mean over its channels, and samples a second. Raises
    ValueError for what cannot be decoded."""
    kind = kind_of(payload)
    if kind in ("wav", "sound", "mp3", *FILMS):
        assert kind is not None
        return read_samples(payload, kind)
    raise ValueError(f"no sound that is known: {described(payload)}")
