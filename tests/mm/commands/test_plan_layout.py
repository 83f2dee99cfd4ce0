"""`plan --layout`: one layout, which may be another program's, of a stage, or too large."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.cli import main
from tests.mm.harness import CONFIGS, small


def layout_file(folder: Path, layout: dict[str, Any], schedule: dict[str, Any] | None = None) -> str:
    file = folder / "l.yaml"
    file.write_text(yaml.safe_dump({"layout": layout, "schedule": schedule or {"microbatches": 1}}))
    return str(file)


def test_a_layout_of_another_program_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What its seconds go to, and faster hardware; the JSON is there, and why nothing near it is tried."""
    given = yaml.safe_load((CONFIGS / "published" / "1b-7b.yaml").read_text())
    file, out = layout_file(tmp_path, given["layout"], given["schedule"]), tmp_path / "o.json"
    config, world = str(CONFIGS / "published" / "1b-7b.yaml"), str(given["run"]["nproc"])
    assert main(["plan", config, "--devices", world, "--layout", file, "--explain", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "are computation of llm." in said and "memory 2 times as fast: 1." in said
    assert "other layouts near it are not tried: run.engine=megatron" in said
    assert json.loads(out.read_text())["candidates"][0]["step_s"] > 0


def test_a_stage_is_planned_and_what_would_fit_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = small(data={"train": ["nothing-*.tar"], "context": 128})
    del raw["model"]["audio"], raw["train"]["steps"]
    raw["stages"] = [{"name": "one", "steps": 1, "train": ["vision"]}, {"name": "two", "steps": 2}]
    config, out, hardware = tmp_path / "c.yaml", tmp_path / "o.json", tmp_path / "h.yaml"
    config.write_text(yaml.safe_dump(raw))
    device = yaml.safe_load((CONFIGS / "hardware" / "h100.yaml").read_text())
    hardware.write_text(yaml.safe_dump(device))
    layout = layout_file(tmp_path, {"llm": {"ranks": "all", "data_parallel": "replicate"}})
    command = ["plan", str(config), "--devices", "2", "--hardware", str(hardware), "--layout", layout]
    assert main([*command, "--stage", "none"]) == 2
    assert "known" in capsys.readouterr().err
    command += ["--stage", "two", "--json", str(out)]
    assert main(command) == 0
    found, reserved = json.loads(out.read_text()), device["memory"]["reserved"]
    assert not found["would_fit"] and not found["rejected"]
    needed = found["candidates"][0]["peak_memory_bytes"] - reserved
    device["memory"]["bytes"] = reserved + 0.97 * needed
    hardware.write_text(yaml.safe_dump(device))
    assert main(command) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "it does not fit: needs" in said and said.count("would fit: ") == len(found["would_fit"]) > 0
    assert found["rejected"][0]["why"] in said
    assert all(f["bytes"] <= device["memory"]["bytes"] for f in found["would_fit"])
