"""Jobs on videos: tubelets, positions in time and timestamps learn alike in any layout."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.cli import main
from tests.encoders.helpers import png
from tests.encoders.test_video import video
from tests.llm.qwen_vl import NAMES
from tests.mm.harness import largest_difference, running
from tests.mm.jobs.test_qwen_vl import LAYOUTS, made, trained
from tests.mm.shards import write_shard
from tests.slow import on_demand

# Qwen3-VL takes odd numbers of a film's frames too: its last tubelet then lacks a second frame.
VIDEOS = {"fps": 2.0, "least_frames": 2, "most_frames": 6, "least": 64, "most": 400}


def gif(frames: int, size: tuple[int, int], milliseconds: int, seed: int) -> bytes:
    """An animated picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
    first, *rest = [Image.fromarray(x) for x in pixels]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds)
    return buffer.getvalue()


def films(folder: Path, n: int = 12) -> Path:
    """Samples of none to two films or pictures, of several sizes, lengths and rates, with text between."""
    r, samples = random.Random(5), []
    for k in range(n):
        parts: dict[str, bytes] = {}
        for i in range(r.choice([0, 1, 1, 2])):
            size, frames = (r.choice([8, 16]), r.choice([8, 24])), r.randint(2, 7)
            kind = ("tar", "gif", "png")[(k + i) % 3]
            if kind == "tar":
                parts[f"clip{i}.tar"] = video(frames, size, r.choice([None, "1.0", "3.5"]))
            elif kind == "gif":
                parts[f"clip{i}.gif"] = gif(frames, size, r.choice([250, 500]), 10 * k + i)
            else:
                parts[f"clip{i}.png"] = png(*size, seed=10 * k + i, mode="RGB")
        segments: list[dict[str, Any]] = []
        for i, name in enumerate(parts):
            segments += [{"text": "a" * (1 + i), "loss": False}, {"vision": name}]
        segments.append({"text": f"sees {k}"})
        samples.append({"key": f"s{k}", "segments": segments, "parts": parts})
    return write_shard(folder / "films.tar", samples)


def job_of(name: str, folder: Path) -> dict[str, Any]:
    """The config of a job on films, of a small tower and language model of Qwen."""
    _, raw = made(name, folder, 1)
    raw["data"] |= {"train": [str(films(folder))], "context": 400}
    raw["model"]["vision"]["options"]["videos"] = VIDEOS
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_learns_from_videos_alike(name: str, tmp_path: Path, ranks: Any) -> None:
    raw = job_of(name, tmp_path)
    raw["schedule"] = {"microbatches": 2}
    expected = ranks(1, trained, raw, 2)[0]
    assert min(expected[0]["grad_norm_by_module"].values()) > 0
    for way, layout in LAYOUTS.items():
        world = 1 + max(int(str(m.get("ranks", "0-3"))[-1]) for m in layout.values())
        for steps in ranks(world, trained, {**raw, "layout": layout}, 2):
            assert largest_difference(steps, expected) < 1e-9, way


def what_is_fed(raw: dict[str, Any]) -> list[list[tuple[int, int, bool]]]:
    """Of the first step, by microbatch: frames taken of each item, which tubelet it is, and its rows."""
    with running(raw) as (_, feed):
        prepared, _ = feed.next(0, 1)
        found = [mb.items["vision"].metas for mb in prepared.micro]
    return [[(m.get("pictures", 1), m.get("group", -1), "fps" in m) for m in metas] for metas in found]


@pytest.mark.parametrize("name", on_demand(NAMES, ["qwen2_5_vl"]))
def test_a_job_is_fed_films_as_its_tower_takes_them(name: str, tmp_path: Path, alone: Any) -> None:
    """Qwen2.5-VL takes a film at once, Qwen3-VL each tubelet after its time."""
    (fed,) = alone(1, what_is_fed, job_of(name, tmp_path))
    every = [item for batch in fed for item in batch]
    films = [item for item in every if item[0] > 1]
    assert len(films) < len(every) and {timed for _, _, timed in films} == {True, False}
    assert ({group for _, group, _ in films} == {-1}) == (name == "qwen2_5_vl")


def test_data_commands_take_films(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = films(tmp_path)
    assert main(["data", "index", str(shard)]) == 0
    assert "12 samples, 0 broken" in capsys.readouterr().out
    assert main(["data", "inspect", str(shard)]) == 0
    assert "6 of them videos of 3-6 frames" in capsys.readouterr().out
