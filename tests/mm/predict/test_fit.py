"""The fit finds the costs that made the figures; curves and files of a calibration are read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm import cli
from mm.predict import calibrate, fit, here, reference
from mm.predict.costs import processor_seconds_of
from mm.predict.hardware import load_hardware

CPU = load_hardware("cpu-gloo")


@settings(max_examples=20)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3), st.integers(0, 1000))
def test_non_negative_finds_the_coefficients(x: list[float], seed: int) -> None:
    a = np.random.default_rng(seed).uniform(0.1, 1, (8, 3)) * [1.0, 1e3, 1e-3]
    b = a @ (np.asarray(x) / [1.0, 1e3, 1e-3])
    assert a @ fit.non_negative(a, b) == pytest.approx(b, rel=1e-3, abs=1e-3)


def test_what_would_be_negative_is_nothing() -> None:
    a = np.asarray([[1.0, 0.0], [0.0, 1.0]])
    assert fit.non_negative(a, np.asarray([2.0, -1.0])).tolist() == [2.0, 0.0]


def test_the_costs_that_made_the_reference_jobs_figures_are_found() -> None:
    numbers = range(len(reference.JOBS))
    jobs = fit.jobs_of([(b, reference.plan_of(b)) for b in map(reference.blueprint_of, numbers)])
    true = fit.with_costs(CPU, fit.BANDWIDTHS[6], np.asarray([4e-5, 1.5e-3, 3e-4, 2e-3]))
    figures = [processor_seconds_of(*job, true) for job in jobs]
    found = fit.fitted(CPU, jobs, figures)
    assert [processor_seconds_of(*job, found) for job in jobs] == pytest.approx(figures, rel=0.01)
    assert found.kernels.launch_s == pytest.approx(4e-5, rel=0.1)
    assert found.host is not None
    assert found.host.collective_s == pytest.approx(1.5e-3, rel=0.2)
    wall = [fit.predict_counts(*job, found).step_s for job in jobs]
    half = fit.with_cores(found, jobs, [2 * w for w in wall]).host
    assert half is not None and half.cores == pytest.approx(found.host.cores / 2)


def test_a_calibration_is_a_file_that_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(here.as_yaml(CPU, "mine"))
    assert load_hardware(path) == replace(CPU, name="mine")


def test_curves_are_shares_of_the_peak() -> None:
    assert calibrate.shares({8: 1e9, 64: 5e9, 512: 9e9}, 8e9) == {
        "size": [8.0, 64.0, 512.0],
        "share": [0.125, 0.625, 1.0],
    }


def test_the_doctor_writes_what_was_measured(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    messages = [{"ranks": n, "latency": 1e-4, "rate": 1e9, "message": 5e-5, "byte": 3e-10} for n in (2, 4)]
    jobs = [{"job": k, "wall": s, "processor": 2 * s} for k, s in ((0, 0.2), (5, 0.4))]
    rates = {"peak": {"float64": 4e10, "float32": 8e10, "bfloat16": 9e10}, "bandwidth": 8e9}
    curve = {"size": [8.0], "share": [0.5], "source": "made up"}
    curves = {k: curve for k in ("product", "grouped", "attention", "convolution")}
    monkeypatch.setattr(here, "_kernels", lambda: {**rates, "curves": curves})
    monkeypatch.setattr(
        here, "_reference", lambda: json.loads(json.dumps({"messages": messages, "jobs": jobs}))
    )
    out = tmp_path / "here.yaml"
    assert cli.main(["doctor", "--calibrate", "--out", str(out)]) == 0
    made = load_hardware(out)
    assert made.name == "here" and made.host is not None
    assert made.host.byte_s == 3e-10 and 0 < made.host.cores <= here.cores()
    assert f"written to {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--out", "x.yaml"], "--out is where --calibrate writes"),
        (["--calibrate", "--out", "no/such/folder/x.yaml"], "there is no folder no/such/folder"),
    ],
)
def test_wrong_options_are_refused(args: list[str], why: str, capsys: Any) -> None:
    assert cli.main(["doctor", *args]) == 2
    assert why in capsys.readouterr().err
