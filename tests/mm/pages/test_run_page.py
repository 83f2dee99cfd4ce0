"""The report of a run: it says what the files say, and nothing that they say acts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.cli import main
from mm.pages.curves import STRETCHES, Curve, thin, ticks
from mm.pages.html import clean
from mm.pages.run_files import read_run
from mm.pages.run_page import run_page
from tests.mm.pages.strict_parser import Checked

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;</style>\u202egpj.exe אבג"


def line(step: int, name: str = "vision", **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5 / step,
        "tokens": 100,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "grad_norm_by_module": {name: 0.5, "llm": 1.5},
        "peak_memory_bytes": 3 * 2**20,
        "data_s": 0.004,
        "seconds_by_module": {name: 0.01, "llm": 0.02},
        "optimizer_s": 0.003,
        "boundary": {name: {"bytes": 10, "seconds": 0.002}},
        "loss_by_source": {name: {"loss": 1.0, "tokens": 3}, "b": {"loss": 2.0, "tokens": 5}},
        "drawn_by_source": {name: {"samples": 7, "tokens": 90 * step}},
        "step_s": 0.1,
        "tokens_per_s": 1000.0,
        **more,
    }


def write_run(folder: Path, steps: int = 3, name: str = "vision") -> Path:
    """Files of a run, as a run writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line(k, name)) for k in range(1, steps + 1)]
    lines.append(json.dumps({"step": steps, "eval_loss": 1.25, "modality_lift": {name: 0.5}}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {"run": {"dir": name}, "train": {"steps": 9}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    layouts = {name: {"ranks": [0, 1], "tp": 2, "pp": 1}, "llm": {"ranks": [2, 3, 4, 5], "pp": 2, "dp": 2}}
    edges = {name: {"rows": 4, "forward_bytes": 2048, "backward_bytes": 0}}
    plan = {"layouts": layouts, "edges": edges, "schedule": {"kind": name}}
    (folder / "plan.json").write_text(json.dumps(plan))
    skip = {"step": 0, "key": name, "shard": f"{name}.tar", "why": f"cannot: {name}"}
    (folder / "skipped.jsonl").write_text(json.dumps(skip) + "\n")
    start = {"step": 0, "command": f"python -m mm train {name}", "host": name, "memory_bytes": 2**30}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "log.txt").write_text(f"begun {name}\nwarning: {name}\n", encoding="utf-8")
    return folder


def said(folder: Path) -> str:
    return " ".join(Checked(run_page(read_run(folder))).said)


def test_a_report_says_what_the_files_say(tmp_path: Path) -> None:
    (write_run(tmp_path / "r") / "schedule-3.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    page = Checked(run_page(read_run(tmp_path / "r")))
    text = " ".join(page.said)
    for found in (
        "3 of 9 steps",
        "5 to 1.667",
        "1.25",
        "+0.5 nats",
        "python -m mm train vision",
        "1 GiB",
        "1 warning in the log",
        "cannot: vision",
        "2 KiB",
        "Step 3 as it ran",
        "2-5",
    ):
        assert found in text, found
    assert len(page.sources) == 1 and page.tags.count("figure") > 8
    assert "270" in text  # the last count of tokens, not the sum of counts


@settings(max_examples=4, deadline=None)
@given(st.text(min_size=1, max_size=20))
def test_nothing_that_a_run_says_acts(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Names of modules, sources and hosts, configs, logs and commands are anybody's text."""
    name = name.encode(errors="ignore").decode() + EVIL
    folder = write_run(tmp_path_factory.mktemp("a"), name=name)
    text = run_page(read_run(folder))
    page = Checked(text)
    assert page.tags.count("script") == 1 and clean(name) in "".join(page.said)
    assert "\u202e" not in text and "אבג" in "".join(page.said)


def test_halves_of_characters_and_controls_are_shown_by_number(tmp_path: Path) -> None:
    folder = write_run(tmp_path, name="a\ud800\x00b".encode("ascii", "backslashreplace").decode())
    (folder / "skipped.jsonl").write_text('{"step": 0, "key": "a\\ud800\\u0000b"}\n')
    page = run_page(read_run(folder))
    page.encode()
    assert "a\\ud800\\u0000b" in page


def test_damage_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    whole = (folder / "metrics.jsonl").read_bytes()
    wrong = [
        *(b"[1]", b"{", b'{"loss": 3}', b'{"step": "4", "loss": 1}', b"\xff\xfe", b"[" * 100_000, b""),
        b'{"step": 4, "loss": 1e999, "grad_norm": 1' + b"0" * 400 + b', "lr": NaN, "tokens": null}',
        b'{"step": 5, "loss": "x", "boundary": [1], "drawn_by_source": {"a": 3}}',
        b'{"step": 6, "lo',
    ]
    (folder / "metrics.jsonl").write_bytes(whole + b"\n".join(wrong))
    layouts = {"a": {"ranks": "all", "pp": 0}, "b": 3, "c": {"ranks": [-1, 10**99], "pp": "x"}}
    (folder / "plan.json").write_text(json.dumps({"layouts": layouts, "edges": [], "schedule": 1}))
    (folder / "config.yaml").write_text("a: [")
    (folder / "starts.jsonl").write_text("null\n{}\n")
    run = read_run(folder)
    assert [(d.file, d.line) for d in run.damaged] == [
        ("metrics.jsonl", 5),
        ("metrics.jsonl", 6),
        ("metrics.jsonl", 7),
        ("metrics.jsonl", 8),
        ("metrics.jsonl", 9),
        ("metrics.jsonl", 10),
        ("metrics.jsonl", 14),
        ("starts.jsonl", 1),
        ("config.yaml", None),
    ]
    text = said(folder)
    assert "9 places" in text and "line 14: not JSON, and the file ends in it" in text
    assert "5 steps" in text and "1.667" in text


def test_a_run_without_a_step_and_a_folder_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.yaml").write_text("train: {steps: 9}")
    assert "0 of 9 steps" in said(tmp_path / "r")
    assert main(["report", str(tmp_path)]) == 2
    assert "neither metrics.jsonl nor config.yaml" in capsys.readouterr().err
    assert main(["report"]) == 2 and main(["report", "a", "b"]) == 2
    assert main(["report", str(tmp_path / "r"), "--out", str(tmp_path / "x/y.html")]) == 2
    assert main(["report", str(tmp_path / "r")]) == 0
    assert "report.html" in capsys.readouterr().out and (tmp_path / "r/report.html").exists()


values = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(values, max_size=300), st.integers(1, 30))
def test_a_thinned_curve_keeps_its_ends_extremes_and_order(found: list[float], stretches: int) -> None:
    curve = Curve("a", list(map(float, range(len(found)))), found)
    kept = thin(curve, stretches)
    assert len(kept.steps) <= max(2 * stretches, 3 * stretches + 1)
    assert list(kept.steps) == sorted(set(kept.steps))
    for x, y in zip(kept.steps, kept.values, strict=True):
        assert y == found[int(x)] or math.isnan(y)
    finite = [y for y in found if math.isfinite(y)]
    if finite:
        drawn = [y for y in kept.values if math.isfinite(y)]
        assert (min(drawn), max(drawn)) == (min(finite), max(finite)) and kept.steps[-1] == len(found) - 1
    assert len(found) > 2 * stretches or list(kept.steps) == list(curve.steps)


def test_a_spike_of_one_step_in_many_thousand_is_drawn() -> None:
    loss = [1.0] * 50_000
    loss[31_337] = 9.0
    kept = thin(Curve("loss", list(map(float, range(50_000))), loss))
    assert 9.0 in kept.values and len(kept.steps) <= 2 * STRETCHES + 1


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 9))
def test_ticks_are_few_round_and_inside(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert 1 <= len(found) <= most + 1
    near = 1e-6 * span + 1e-12 * abs(low)
    assert all(low - near <= v <= low + span + near for v in found)
