"""Videos as frames: frames taken, sizes, times and pixels are those of Qwen's video processors."""

from __future__ import annotations

import io
import math
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import encoders
from encoders.contract import Meta, pack_items
from encoders.media.probe import probe_media as probe_video
from encoders.vision.config import Pictures, Videos
from encoders.vision.video import seconds, step_seconds, taken, video_size
from mm.data.probes import metadata
from tests.encoders.helpers import module, png

import tests.llm.oracle  # noqa: F401  isort: skip
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor  # isort: skip
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize as of_frame  # isort: skip
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor  # isort: skip
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor  # isort: skip
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_all  # isort: skip
from transformers.video_utils import VideoMetadata  # isort: skip

QWEN2: Any = encoders.resolve("qwen2_5_vl")
QWEN3: Any = encoders.resolve("qwen3_vl")
SIDE = st.integers(1, 900)


def video(frames: int, size: tuple[int, int], fps: str | None = None, order: int = 1) -> bytes:
    """A tar of pictures; order: -1 writes the last frame first."""
    buffer = io.BytesIO()
    files = [(f"{k:03}.png", png(*size, seed=k, mode="RGB")) for k in range(frames)][::order]
    files += [] if fps is None else [("fps", fps.encode())]
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pixels(frames: int, size: tuple[int, int]) -> np.ndarray:
    """The same as an array [frames, height, width, 3]."""
    return np.stack([np.array(Image.open(io.BytesIO(png(*size, seed=k, mode="RGB")))) for k in range(frames)])


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 300), rate=st.floats(0.5, 60), fps=st.floats(0.5, 8), most=st.integers(2, 64))
def test_the_frames_that_are_taken_are_qwens(n: int, rate: float, fps: float, most: int) -> None:
    meta: Any = {"pictures": n, "fps": rate, "height": 64, "width": 64}
    info = VideoMetadata(total_num_frames=n, fps=rate, duration=n / rate)
    least = min(4, most)
    cfg = QWEN3.Config(videos=Videos("ends", fps, least_frames=least, most_frames=most))
    expected = Qwen3VLVideoProcessor(min_frames=least, max_frames=most).sample_frames(info, fps=fps).tolist()
    assert taken(cfg, meta) == expected
    times: Any = Qwen3VLProcessor._calculate_timestamps
    assert seconds(cfg, meta) == times(None, list(expected), rate)
    cfg = QWEN2.Config(videos=Videos("stride", fps, least_frames=least, most_frames=most))
    sampled = Qwen2VLVideoProcessor(min_frames=least, max_frames=most).sample_frames(info, fps=fps).tolist()
    assert taken(cfg, meta) == sampled
    assert math.isclose(step_seconds(cfg, meta), 2 / (len(sampled) / n * rate))


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 40), height=SIDE, width=SIDE)
@example(n=4, height=1, width=20000)
@example(n=4, height=300, width=1)
def test_the_size_of_frames_is_qwens(n: int, height: int, width: int) -> None:
    meta = {"pictures": n, "height": height, "width": width}
    limits: dict[str, Any] = {"least": 40_000, "most": 400_000}
    whole = QWEN3.Config(patch=4, videos=Videos(area="all", **limits))
    each = QWEN2.Config(patch=4, videos=Videos(**limits))
    rules: list[tuple[Any, Any]] = [
        (whole, lambda: of_all(n, height, width, 2, 8, 40_000, 400_000)),
        (each, lambda: of_frame(height, width, 8, 40_000, 400_000)),
    ]
    for cfg, rule in rules:
        try:
            expected = rule()
        except ValueError:
            with pytest.raises(ValueError, match="needed: a longer side of at most 200 times"):
                video_size(cfg, meta)
            continue
        assert video_size(cfg, meta) == expected


@pytest.mark.parametrize("size", [(31, 50), (16, 16), (57, 20)], ids=str)
@pytest.mark.parametrize("frames", [4, 5])
def test_pixels_are_those_of_the_processors(size: tuple[int, int], frames: int) -> None:
    limits = {"shortest_edge": 900, "longest_edge": 6000}
    kinds: list[tuple[Any, Any, Any]] = [
        (QWEN3, Videos("ends", area="all", least=900, most=6000), Qwen3VLVideoProcessor),
        (QWEN2, Videos("all", least=900, most=6000), Qwen2VLVideoProcessor),
    ]
    for cls, how, kind in kinds:
        cfg = cls.Config(patch=4, videos=how)
        processor = kind(patch_size=4, size=limits)
        info = VideoMetadata(total_num_frames=frames, fps=4.0, duration=frames / 4)
        expected = processor(videos=[pixels(frames, size)], video_metadata=[info], return_tensors="pt")
        payload = video(frames, size, "4.0", order=-1)
        meta = metadata("tar", payload)
        assert meta == {"pictures": frames, "fps": 4.0, "height": size[0], "width": size[1], "channels": 3}
        assert list(cls.grid(cfg, meta)) == expected["video_grid_thw"][0].tolist()
        found = cls.prepare(cfg, payload, meta)
        assert len(found) == cls.input_count(cfg, meta)
        torch.testing.assert_close(found, expected["pixel_values_videos"], atol=1e-5, rtol=0)


def rows_of(net: Any, payload: bytes, metas: list[Meta]) -> torch.Tensor:
    cls, cfg = type(net.encoder), net.cfg
    tensors = [cls.prepare(cfg, payload, meta) for meta in metas]
    values: torch.Tensor = net(pack_items(cls, cfg, tensors, metas, device="cpu", dtype=torch.float64)).values
    return values


def test_tubelets_one_by_one_are_the_video() -> None:
    """Features of tubelets, between which are times, equal those of the video at once: no frame attends to
    another."""
    tagged = Videos("all", area="all", least=64, most=400, frame_tag="<{seconds}>", frame_end="</>")
    net = module("qwen3_vl", channels=3, pictures=QWEN3.Config().pictures, videos=tagged)
    payload = video(5, (9, 13), "2")
    pieces = QWEN3.pieces(net.cfg, probe_video(payload))
    assert [p for p in pieces if isinstance(p, str)] == ["<0.2>", "</>", "<1.2>", "</>", "<2.0>", "</>"]
    metas = [p for p in pieces if not isinstance(p, str)]
    whole = rows_of(net, payload, [probe_video(payload)])
    torch.testing.assert_close(rows_of(net, payload, metas), whole, atol=1e-12, rtol=0)
    bare = replace(net.cfg, videos=replace(tagged, frame_tag="", frame_end=""))
    assert QWEN3.pieces(bare, probe_video(payload)) == (probe_video(payload),)


def test_frames_of_families_with_class_tokens_are_pictures() -> None:
    net = module("dinov2", channels=3, prefix_rows=True, pictures=Pictures("exact", 8, 8))
    payload = video(3, (9, 13))
    cls: Any = type(net.encoder)
    metas = cls.pieces(net.cfg, probe_video(payload))
    assert len(metas) == 3 and all(cls.rows(net.cfg, m) == 16 + 3 for m in metas)
    found = rows_of(net, payload, metas).split(19)
    for k, rows in enumerate(found):
        still = rows_of(net, png(9, 13, seed=k, mode="RGB"), [{"height": 9, "width": 13, "channels": 3}])
        torch.testing.assert_close(rows, still, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animated_pictures_are_videos(kind: str) -> None:
    buffer = io.BytesIO()
    images = [Image.fromarray(np.full((8, 12, 3), 60 * k, dtype=np.uint8)) for k in range(4)]
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=250, lossless=True)
    meta = metadata(kind.lower(), buffer.getvalue())
    assert meta == {"pictures": 4, "fps": 4.0, "height": 8, "width": 12, "channels": 3}
    cfg = QWEN2.Config(patch=2, videos=Videos(least=16, most=96))
    found = QWEN2.prepare(cfg, buffer.getvalue(), meta)
    wanted = [(60 * k / 255 - cfg.pictures.mean[0]) / cfg.pictures.std[0] for k in range(4)]
    red = found.view(2, 24, 3, 2, 4)[:, :, 0]  # [tubelets, patches, frames, pixels]
    torch.testing.assert_close(red.mean((1, 3)).flatten(), torch.tensor(wanted), atol=0.01, rtol=0)


def test_a_picture_of_one_frame_is_no_video() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 12, 3), dtype=np.uint8)).save(buffer, "WEBP", lossless=True)
    meta = metadata("webp", buffer.getvalue())
    assert meta == {"height": 8, "width": 12, "channels": 3}
    assert QWEN3.prepare(QWEN3.Config(), buffer.getvalue(), meta).shape[1] == 3 * 2 * 16 * 16


def test_videos_that_cannot_be_used_are_named() -> None:
    def tar(*files: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as out:
            for k, data in enumerate(files):
                info = tarfile.TarInfo(f"{k}.png")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    with pytest.raises(ValueError, match="frames of 2 sizes; needed: one frame at least, all of one size"):
        probe_video(tar(png(4, 4), png(4, 5)))
    with pytest.raises(ValueError, match="no picture, sound or video"):
        probe_video(tar())
    with pytest.raises(ValueError, match=r"its file fps says 0.0; needed: a number above 0"):
        probe_video(video(2, (4, 4), "0"))
    cfg = QWEN2.Config(videos=Videos("stride", most_frames=1))
    with pytest.raises(ValueError, match="of 9 frames, of which 0 are taken; needed: 2 for a tubelet"):
        QWEN2.rows(cfg, {"pictures": 9, "height": 99, "width": 99})
    with pytest.raises(ValueError, match="a video of 3 frames, its index says 4 at least"):
        QWEN3.prepare(QWEN3.Config(), video(3, (40, 40)), {"pictures": 4, "height": 40, "width": 40})
    with pytest.raises(ValueError, match=r"a frame is \(40, 40\), its index says 40x44"):
        QWEN3.prepare(QWEN3.Config(), video(3, (40, 40)), {"pictures": 3, "height": 40, "width": 44})
