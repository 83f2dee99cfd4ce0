"""Films: frames, their number and times are those of FFmpeg read from the begin, and of transformers."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import encoders
from encoders.media import films
from encoders.media.decode import decode_frames, decode_still
from encoders.media.probe import probe_media
from encoders.vision.config import Videos
from encoders.vision.video import seconds, taken
from tests.encoders.media.made import by_av, film, noise, shades

import tests.llm.oracle  # noqa: F401  isort: skip
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # isort: skip
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor  # isort: skip
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor  # isort: skip
from transformers.video_utils import load_video  # isort: skip

av: Any = pytest.importorskip("av")

CODED: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", {"g": "12", "bf": "2"}),
    "mp4 open": ("mp4", "libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    "mov": ("mov", "mpeg4", {"g": "5"}),
    "mkv": ("matroska", "libx264", {"g": "250"}),
    "webm vp8": ("webm", "libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}),
    "webm vp9": ("webm", "libvpx-vp9", {"g": "10", "cpu-used": "8"}),
    "avi": ("avi", "mpeg4", {"g": "6"}),
}


def whole(payload: bytes) -> np.ndarray:
    """All frames [n, height, width, 3], decoded in order from the begin."""
    with av.open(io.BytesIO(payload)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", CODED)
def test_frames_that_are_sought_are_those_read_in_order(name: str) -> None:
    form, codec, options = CODED[name]
    fps = Fraction(30000, 1001) if form in ("mp4", "matroska") else Fraction(25)
    n = 40
    payload = film(shades(n), form, codec, fps=fps, **options)
    expected = whole(payload)
    meta = probe_media(payload)
    assert len(expected) == n
    assert meta.pop("fps") == pytest.approx(float(fps), rel=2e-3)
    assert meta == {"height": 48, "width": 64, "channels": 3, "pictures": n}
    rng = np.random.default_rng(0)
    some = [sorted(rng.integers(0, n, 5).tolist()) for _ in range(4)]
    for numbers in ([0], [n - 1], list(range(n)), *some):
        found = torch.stack(list(decode_frames(payload, numbers, 3)))
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected[numbers]), numbers
    assert np.array_equal(decode_still(payload, 3).permute(1, 2, 0).numpy(), expected[0])


def test_frames_and_times_are_those_of_transformers(tmp_path: Any) -> None:
    """From the file on: transformers reads it with PyAV, its processor samples, and ours equals both."""
    file = tmp_path / "a.mp4"
    file.write_bytes(film(shades(60), fps=Fraction(24)))
    payload, meta = file.read_bytes(), probe_media(file.read_bytes())
    for family, how, processor in (
        ("qwen3_vl", "ends", Qwen3VLVideoProcessor()),
        ("qwen2_5_vl", "stride", Qwen2VLVideoProcessor()),
    ):
        cfg: Any = encoders.resolve(family).Config(videos=Videos(how, 2.0))

        def sample(metadata: Any, of: Any = processor, **_: Any) -> Any:
            return of.sample_frames(metadata, fps=2.0)

        theirs, info = load_video(str(file), sample_indices_fn=sample, backend="pyav")
        assert taken(cfg, meta) == np.asarray(info.frames_indices).tolist()
        ours = torch.stack(list(decode_frames(payload, taken(cfg, meta), 3)))
        assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), np.asarray(theirs))
        if family == "qwen3_vl":
            times: Any = Qwen3VLProcessor._calculate_timestamps
            assert seconds(cfg, meta) == pytest.approx(
                times(None, np.asarray(info.frames_indices).tolist(), info.fps)
            )


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_at_a_variable_rate_a_frame_is_shown_at_its_time(form: str) -> None:
    """Two seconds of still picture, then half a second of many: the picture at t is the one nearest to t."""
    times = [0, 1000, 2000, *range(2050, 2550, 50)]
    payload = film(shades(13), form, "libx264", times=times, g="6")
    meta = probe_media(payload)
    assert meta["pictures"] == 13
    steps = np.arange(13) / meta["fps"] * 1000
    assert steps[-1] == pytest.approx(2500, rel=0.05)
    nearest = [int(np.abs(np.array(times) - step).argmin()) for step in steps]
    expected = whole(payload)[nearest]
    found = torch.stack(list(decode_frames(payload, list(range(13)), 3))).permute(0, 2, 3, 1).numpy()
    same = [np.array_equal(a, b) for a, b in zip(found, expected, strict=True)]
    assert sum(same) >= 12  # a step may lie in the middle of two


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_films_are_turned_as_players_turn_them(turned: int) -> None:
    frames = shades(3)
    frames[:, :16, :16] = 255  # a mark above at the left
    payload = film(frames, turned=turned)
    meta = probe_media(payload)
    assert (meta["height"], meta["width"]) == ((48, 64) if turned == 180 else (64, 48))
    upright = decode_still(payload, 3).permute(1, 2, 0).numpy()
    assert upright.shape[:2] == (meta["height"], meta["width"])
    corners = {"above left": upright[4, 4], "above right": upright[4, -4], "below left": upright[-4, 4]}
    corners["below right"] = upright[-4, -4]
    brightest = max(corners, key=lambda name: int(corners[name].sum()))
    assert brightest == {90: "below left", 180: "below right", 270: "above right"}[turned]


def test_frames_that_only_refer_are_none() -> None:
    """Alternate reference frames of VP8: packets that show nothing."""
    payload = film(shades(12), "webm", "libvpx", g="12", **{"cpu-used": "8"})
    with av.open(io.BytesIO(payload)) as container:
        hidden = [bytes(p) for p in container.demux(video=0) if p.size][5]
    assert payload.count(hidden) == 1 and hidden[0] & 16
    payload = payload.replace(hidden, bytes([hidden[0] & ~16]) + hidden[1:])
    expected = whole(payload)
    assert probe_media(payload)["pictures"] == len(expected) == 11
    assert len(list(decode_frames(payload, list(range(11)), 3))) == 11


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = film(shades(200, 16, 16), g="20", bf="0")
    decoded: list[int] = []
    before = films._from

    def counted(*args: Any) -> Any:
        for frame in before(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(films, "_from", counted)
    assert len(list(decode_frames(payload, [0, 65, 66, 199], 3))) == 4
    assert len(decoded) <= 1 + 7 + 20


def test_covers_of_records_are_no_films() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        sound: Any = out.add_stream("aac", rate=8000, layout="mono")
        cover: Any = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame.from_ndarray(shades(1, 16, 16)[0], "rgb24")))
        frame = av.AudioFrame.from_ndarray(noise(1024).T.astype(np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        for s, f in ((sound, frame), (cover, None), (sound, None)):
            out.mux(s.encode(f))
    assert set(probe_media(buffer.getvalue())) == {"samples", "rate"}


def test_what_is_no_film_is_named() -> None:
    payload = film(shades(30))
    for damaged in (payload[:200], payload[: len(payload) // 3], payload[:64] + bytes(len(payload) - 64)):
        with pytest.raises(ValueError, match=r"cannot be decoded|has no"):
            probe_media(damaged)
    sound = by_av(noise(3000), 48000, "webm", "libopus")
    with pytest.raises(ValueError, match="it has no pictures"):
        list(decode_frames(sound, [0], 3))
    with pytest.raises(ValueError, match="a video of 30 frames, its index says 31 at least"):
        list(decode_frames(payload, [30], 3))


def test_a_film_of_large_frames_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = film(shades(2))
    monkeypatch.setattr(films, "BOUNDS", films.BOUNDS.__class__(pixels=48 * 64 - 1))
    with pytest.raises(ValueError, match=r"48x64 pixels are 3072, more than data.limits.pixels=3071"):
        probe_media(payload)
    monkeypatch.setattr(films, "BOUNDS", films.BOUNDS.__class__(frames=1))
    with pytest.raises(ValueError, match=r"it has 2 frames, more than data.limits.frames=1"):
        probe_media(payload)
