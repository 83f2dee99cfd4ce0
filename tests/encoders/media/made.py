"""Sounds and videos for tests, written by the packages that read them and by others."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Smooth noise [samples, channels] within [-0.9, 0.9], each channel another."""
    steps = np.random.default_rng(seed).standard_normal((samples, channels)) * 0.01
    return np.clip(np.cumsum(steps, axis=0), -0.9, 0.9)


def by_soundfile(x: np.ndarray, rate: int, form: str, subtype: str) -> bytes:
    """Samples [n, channels] as a file of libsndfile."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, x, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def by_av(x: np.ndarray, rate: int, form: str, codec: str, **options: str) -> bytes:
    """Samples [n, channels] as a file of FFmpeg."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=options) as out:
        layout = {1: "mono", 2: "stereo"}[x.shape[1]]
        stream: Any = out.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T, np.float32), "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        fifo = av.AudioFifo()
        for piece in av.AudioResampler(stream.codec_context.format, layout, rate).resample(frame):
            fifo.write(piece)
        size = stream.codec_context.frame_size or 1024
        while (piece := fifo.read(size)) is not None:
            out.mux(stream.encode(piece))
        if fifo.samples:
            out.mux(stream.encode(fifo.read()))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def shades(n: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames [n, height, width, 3] that each are told from all others by their grey, also after coding."""
    levels = np.linspace(20, 235, n).round().astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, height, width, 3)).copy()


def film(
    frames: np.ndarray,
    form: str = "mp4",
    codec: str = "libx264",
    *,
    fps: Fraction | int = 25,
    times: Sequence[int] | None = None,
    turned: int = 0,
    **options: str,
) -> bytes:
    """Frames [n, height, width, 3] as a film.

    times: of each frame in milliseconds; by default all are equally long. turned: degrees, counterclockwise,
    by which a player turns it. options: of the codec.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as out:
        stream: Any = out.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24")
            frame.pts, frame.time_base = (
                (k, 1 / Fraction(fps)) if times is None else (times[k], Fraction(1, 1000))
            )
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return _turned(buffer.getvalue(), turned) if turned else buffer.getvalue()


def _turned(mp4: bytes, degrees: int) -> bytes:
    """The matrix of the film's track replaced (ISO/IEC 14496-12, 8.3.2)."""
    at = mp4.index(b"tkhd") + 4 + 40
    one = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}[degrees]
    a, b, c, d = (n * 65536 for n in one)
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 2**30], dtype=">i4").tobytes()
    return mp4[:at] + matrix + mp4[at + 36 :]
