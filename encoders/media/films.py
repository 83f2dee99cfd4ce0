"""Films: the pictures of MP4, MOV, WebM, Matroska and AVI, by PyAV.

A film of n frames is taken at n equal steps of time from its first frame on, at the frames a second that it
has on average. At constant rate step k is frame k. At a variable rate it is the frame nearest to its time, so
that the time of a picture is right. Only the packets are read for this, and frames are decoded from the last
key frame before each that is wanted.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from encoders.media.errors import package, readable
from encoders.media.frames import Frames, check_numbers
from encoders.media.kinds import Kind
from encoders.media.limits import BOUNDS
from encoders.media.pictures import check_channels, image_tensor


@dataclass(frozen=True)
class Clock:
    """When the frames of a film are shown, in units of `base` seconds: all in order, and the key frames."""

    times: tuple[int, ...]
    keys: tuple[int, ...]
    base: Fraction
    stated: Fraction | None  # frames a second, by the container

    @property
    def rate(self) -> float | None:
        """Frames a second: what the container says where the times agree to a frame, else their mean."""
        n, span = len(self.times), float((self.times[-1] - self.times[0]) * self.base)
        if n < 2:
            return None
        if self.stated and abs((n - 1) / self.stated - span) <= 1 / self.stated:
            return float(self.stated)
        if not span:
            raise ValueError(f"its {n} frames have one time")
        return (n - 1) / span

    def at(self, number: int) -> int:
        """The time of the frame that is nearest to a step."""
        if self.rate is None:
            return self.times[0]
        wanted = self.times[0] + float(number / self.rate / self.base)
        k = min(bisect_left(self.times, wanted), len(self.times) - 1)
        before = self.times[max(0, k - 1)]
        return before if wanted - before < self.times[k] - wanted else self.times[k]

    def key(self, time: int) -> int:
        """The time of the last key frame at or before `time`."""
        return self.keys[max(0, bisect_right(self.keys, time) - 1)]


def has_film(payload: bytes, kind: Kind) -> bool:
    """Whether a container has moving pictures; the cover of a record is none."""
    with readable("the container"), _opened(payload, kind) as container:
        return _stream(container) is not None


def probe_film(payload: bytes, kind: Kind) -> Frames:
    """Sizes of a film. Its packets are counted and its first frame is decoded. O(bytes). Raises ValueError
    for what cannot be decoded and beyond BOUNDS."""
    with readable("the video"), _opened(payload, kind) as container:
        stream = _required(container)
        clock = _clock(container, stream)
        first = next(_decoded(container, stream, clock, clock.times[:1]))
        height, width = _array(first, 1).shape[:2]
        channels = 1 if first.format.name.startswith("gray") else 3
        return Frames(height, width, channels, len(clock.times), clock.rate)


def film_frames(payload: bytes, kind: Kind, numbers: Sequence[int], channels: int) -> Iterator[Tensor]:
    """The frames with these numbers, which do not fall: uint8 [channels, height, width] each, upright.

    Colours are those of FFmpeg's conversion to rgb24, as transformers' reader with PyAV gives them.
    """
    with readable("the video"), _opened(payload, kind) as container:
        stream = _required(container)
        clock = _clock(container, stream)
        check_numbers(numbers, len(clock.times))
        for frame in _decoded(container, stream, clock, [clock.at(n) for n in numbers]):
            check_channels(1 if frame.format.name.startswith("gray") else 3, channels)
            yield image_tensor(_array(frame, channels))


def _opened(payload: bytes, kind: Kind) -> Any:
    return package("av", "video in MP4, WebM, Matroska and AVI").open(io.BytesIO(payload), format=kind)


def _stream(container: Any) -> Any:
    av = package("av", "video")
    covers = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & covers), None)


def _required(container: Any) -> Any:
    stream = _stream(container)
    if stream is None:
        raise ValueError("it has no pictures")
    context = stream.codec_context
    BOUNDS.check({"height": context.height, "width": context.width})
    context.thread_count = 1  # a process may fork, and has as many threads as it was given
    context.options = {**context.options, "max_pixels": str(BOUNDS.pixels)}
    return stream


def _clock(container: Any, stream: Any) -> Clock:
    """Read all packets of a film, and go back to its begin. Raises ValueError for one without frames, and for
    one whose packets have no times."""
    times, keys = [], []
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard or _hidden(packet, stream.codec_context.name):
            continue
        if packet.pts is None:
            raise ValueError("a packet has no time; needed: a container with times, such as MP4 or WebM")
        times.append(packet.pts)
        keys += [packet.pts] if packet.is_keyframe else []
        BOUNDS.check({"pictures": len(times)})
    if not times or not keys:
        raise ValueError("it has no frames" if not times else "it has no key frame")
    return Clock(tuple(sorted(times)), tuple(sorted(keys)), stream.time_base, stream.average_rate)


def _hidden(packet: Any, codec: str) -> bool:
    """Whether a packet of VP8 only refers: RFC 6386, section 9.1, show_frame."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] >> 4 & 1


def _decoded(container: Any, stream: Any, clock: Clock, wanted: Sequence[int]) -> Iterator[Any]:
    """The frames at these times, which do not fall, each decoded from the key frame before it unless the
    decoder is past that already."""
    frames: Iterator[Any] = iter(())
    found: Any = None
    for time in wanted:
        if found is None or clock.key(time) > found.pts:
            frames, found = _from(container, stream, clock.key(time)), None
        while found is None or found.pts < time:
            found = next(frames, None)
            if found is None:
                raise ValueError(f"it ends before {float(time * clock.base):g} s")
            if found.pts is None:
                raise ValueError("a frame has no time")
        if found.pts != time:
            raise ValueError(f"it has no frame at {float(time * clock.base):g} s, though a packet")
        yield found


def _from(container: Any, stream: Any, time: int) -> Iterator[Any]:
    container.seek(time, stream=stream, backward=True)
    return iter(container.decode(stream))


def _array(frame: Any, channels: int) -> np.ndarray:
    """Pixels [height, width, 3] or [height, width], turned as the film says."""
    array = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
    return np.rot90(array, round(frame.rotation / 90) % 4)
