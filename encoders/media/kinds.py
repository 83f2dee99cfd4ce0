"""What a file is, by its first bytes: its name may be wrong."""

from __future__ import annotations

from typing import Literal

Kind = Literal["picture", "animation", "tar", "wav", "stream"]

BRANDS = (b"avif", b"avis", b"mif1")  # of pictures in the boxes of MP4
STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"\xff\xd8\xff", "picture"),  # JPEG
    (b"BM", "picture"),
    (b"II*\0", "picture"),  # TIFF, little-endian
    (b"MM\0*", "picture"),
    (b"GIF87a", "animation"),
    (b"GIF89a", "animation"),
    (b"fLaC", "stream"),
    (b"OggS", "stream"),
    (b"ID3", "stream"),  # MP3
    (b"\x1aE\xdf\xa3", "stream"),  # WebM, Matroska
    (b"RF64", "stream"),  # WAV beyond 4 GiB
)


def kind_of(payload: bytes) -> Kind | None:
    """What a file is: a still picture, an animated one (it may have one frame), a tar of frames, WAV, or a
    stream of sound or video in another container. None for what is none of these."""
    if payload[:4] == b"RIFF":
        riff: dict[bytes, Kind] = {b"WEBP": "animation", b"WAVE": "wav", b"AVI ": "stream"}
        return riff.get(payload[8:12])
    if payload[4:8] == b"ftyp":
        return "picture" if payload[8:12] in BRANDS else "stream"
    for start, kind in STARTS:
        if payload.startswith(start):
            return kind
    if payload[257:262] == b"ustar":
        return "tar"
    if len(payload) > 4 and payload[0] == 0xFF and payload[1] & 0xE0 == 0xE0:  # the frame sync of MPEG audio
        return "stream"
    return None


def described(payload: bytes) -> str:
    """The beginning of a file that is nothing known, in words."""
    return f"it begins with {payload[:8]!r}" if payload else "it is empty"
