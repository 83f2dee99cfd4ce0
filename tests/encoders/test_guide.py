"""docs/adding_an_encoder.md, followed step by step: its code and its config are those that are run here."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import encoders
from encoders.registry import GROUP
from tests.mm.harness import small, train_few
from tests.mm.shards import sensor_samples, write_shard
from tests.pages import ROOT


def blocks(kind: str) -> list[str]:
    """The guide's code blocks of a language, in order."""
    parts = (ROOT / "docs" / "adding_an_encoder.md").read_text().split("```")
    return [p.removeprefix(f"{kind}\n") for p in parts[1::2] if p.startswith(f"{kind}\n")]


def one(kind: str, holding: str) -> str:
    (found,) = [b for b in blocks(kind) if holding in b]
    return found


def installed(folder: Path) -> None:
    """The guide's package in a folder, as pip lays one out: its module, and its entry point."""
    (folder / "series_encoder.py").write_text(one("python", "class SeriesEncoder"))
    groups = tomllib.loads(one("toml", "entry-points"))["project"]["entry-points"]
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for g, points in groups.items()]
    info = folder / "series_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: series_encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 8))


def trained(folder: str) -> tuple[float, list[dict[str, Any]]]:
    """How far the features of the encoder, resolved by its name, are from those of the module that it wraps,
    and two steps of training with the guide's config."""
    sys.path.insert(0, folder)
    try:
        section = yaml.safe_load(one("yaml", "encoder: series"))["model"]
        options = {"weights": f"{folder}/{section['series']['options']['weights']}"}
        cls = encoders.resolve(section["series"]["encoder"])
        cfg = cls.Config(**options)
        net: Any = cls(cfg, None, device=None, dtype=torch.float64)
        x = torch.randn(5, 3, dtype=torch.float64)
        batch = encoders.ItemBatch(x, (2, 3), ({"dim0": 2}, {"dim0": 3}))
        difference = float((net(batch).values - network().double()(x)).detach().abs().max())
        raw = small(data={"train": [f"{folder}/*.tar"]})
        raw["model"] = {"series": {**section["series"], "options": options}, "llm": raw["model"]["llm"]}
        return difference, train_few(raw, 2)
    finally:
        sys.path.remove(folder)


def test_the_guide_makes_an_encoder_that_trains(tmp_path: Path, ranks: Any) -> None:
    installed(tmp_path)
    torch.save(network().state_dict(), tmp_path / "series.pt")
    write_shard(tmp_path / "a.tar", sensor_samples(20, module="series"))
    ((difference, steps),) = ranks(1, trained, str(tmp_path))
    assert difference < 1e-12
    assert steps[0]["grad_norm_by_module"]["series"] > 0 and steps[1]["loss"] != steps[0]["loss"]


def test_wrapping_takes_at_most_25_lines() -> None:
    lines = [line for line in one("python", "class SeriesEncoder").splitlines() if line.strip()]
    assert len(lines) <= 25


def test_a_plug_in_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path)
    with pytest.raises(ValueError, match="no encoder named 'series'"):
        encoders.resolve("series")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [p.name for p in entry_points(group=GROUP)] == ["series"]
    assert encoders.resolve("series").__name__ == "SeriesEncoder"
    with pytest.raises(ValueError, match="did you mean 'series'"):
        encoders.resolve("serie")
    (tmp_path / "series_encoder-1.0.dist-info" / "entry_points.txt").write_text(
        f"[{GROUP}]\nseries = no.such:X\n"
    )
    with pytest.raises(ValueError, match=r"'no\.such:X' cannot be imported.*entry point"):
        encoders.resolve("series")
    assert "series" not in encoders.registry._registry
