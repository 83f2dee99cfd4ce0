"""The probe of all media: sizes of a file by what it is, whatever its name says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from encoders.media.frames import probe_animation, probe_tar
from encoders.media.kinds import Kind, described, kind_of
from encoders.media.limits import BOUNDS
from encoders.media.pictures import probe_picture
from encoders.media.sounds import probe_wav

PROBES: dict[Kind, Callable[[bytes], dict[str, Any]]] = {
    "picture": probe_picture,
    "animation": lambda payload: probe_animation(payload).meta,
    "tar": lambda payload: probe_tar(payload).meta,
    "wav": probe_wav,
}


def probe_media(payload: bytes) -> dict[str, Any]:
    """Metadata of a file. Picture: height, width, channels. Video: also pictures (its frames) and fps where
    it says so. Sound: samples (of each channel) and rate.

    Raises ValueError, in words, for what is nothing known, damaged, empty, or larger than BOUNDS.
    """
    BOUNDS.check({}, len(payload))
    kind = kind_of(payload)
    if kind is None:
        raise ValueError(f"no picture, sound or video that is known: {described(payload)}")
    return PROBES[kind](payload)
