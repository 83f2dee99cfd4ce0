"""What a file is, by its first bytes: its name may be wrong."""

from __future__ import annotations

from typing import Literal

Kind = Literal["picture", "animation", "tar", "wav", "sound", "mp3", "mp4", "matroska", "avi"]

BRANDS = (b"avif", b"avis", b"mif1")  # of pictures in the boxes of MP4
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # with which MP4 and QuickTime begin
STARTS: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"\xff\xd8\xff", "picture"),  # JPEG
    (b"BM", "picture"),
    (b"II*\0", "picture"),  # TIFF, little-endian
    (b"MM\0*", "picture"),
    (b"GIF87a", "animation"),
    (b"GIF89a", "animation"),
    (b"fLaC", "sound"),
    (b"OggS", "sound"),  # Vorbis, Opus, FLAC
    (b"RF64", "sound"),  # WAV beyond 4 GiB
    (b"ID3", "mp3"),
    (b"\x1aE\xdf\xa3", "matroska"),  # WebM too
)


def kind_of(payload: bytes) -> Kind | None:
    """What a file is: a still picture, an animated one (it may have one frame), a tar of frames, WAV, another
    sound, or a container of sound or video. None for what is none of these."""
    if payload[:4] == b"RIFF":
        riff: dict[bytes, Kind] = {b"WEBP": "animation", b"WAVE": "wav", b"AVI ": "avi"}
        return riff.get(payload[8:12])
    if payload[4:8] in BOXES:
        return "picture" if payload[4:12] in [b"ftyp" + brand for brand in BRANDS] else "mp4"
    for start, kind in STARTS:
        if payload.startswith(start):
            return kind
    if payload[257:262] == b"ustar":
        return "tar"
    sync = int.from_bytes(payload[:2], "big")  # of MPEG audio: eleven ones, then a version and a layer
    return "mp3" if sync & 0xFFE0 == 0xFFE0 and sync & 0x0006 else None


def described(payload: bytes) -> str:
    """The beginning of a file that is nothing known, in words."""
    return f"it begins with {payload[:8]!r}" if payload else "it is empty"
