"""The probe of all media: sizes of a file by what it is, whatever its name says."""

from __future__ import annotations

from typing import Any

from encoders.media.films import has_film, probe_film
from encoders.media.frames import probe_animation, probe_tar
from encoders.media.kinds import described, kind_of
from encoders.media.limits import BOUNDS
from encoders.media.pictures import probe_picture
from encoders.media.sounds import probe_sound


def probe_media(payload: bytes) -> dict[str, Any]:
    """Metadata of a file. Picture: height, width, channels. Video: also pictures (its frames) and fps where
    it says so. Sound: samples (of each channel) and rate.

    Raises ValueError, in words, for what is nothing known, damaged, empty, or larger than BOUNDS.
    """
    BOUNDS.check({}, len(payload))
    kind = kind_of(payload)
    if kind is None:
        raise ValueError(f"no picture, sound or video that is known: {described(payload)}")
    if kind == "picture":
        return probe_picture(payload)
    if kind in ("wav", "sound", "mp3"):
        return probe_sound(payload, kind)
    if kind in ("animation", "tar"):
        return (probe_animation if kind == "animation" else probe_tar)(payload).meta
    return probe_film(payload, kind).meta if has_film(payload, kind) else probe_sound(payload, kind)
