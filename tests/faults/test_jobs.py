"""Real jobs with real faults. `python -m tests.faults` makes more of them (docs/faults.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mm.jobs.test_job import ROOT, environment


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--seed", "5", "--json", str(out), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


KILLS = ["--faults=10", "--kinds=kill,mid-save,kill,raises", "--steps=48"]


def outcomes(folder: Path, *suites: list[str]) -> list[dict[str, Any]]:
    """What became of each fault. Hangs take the time of their time-outs, so suites run at once."""
    outs = [folder / f"{n}.json" for n in range(len(suites))]
    running = [start(out, *arguments) for out, arguments in zip(outs, suites, strict=True)]
    said = [suite.communicate(timeout=500)[0] for suite in running]
    # As one text: pytest shortens lists. It has the table, and what each job said that fell short.
    assert all(suite.returncode == 0 for suite in running), "\n\n".join(said)
    return [one for out in outs for one in json.loads(out.read_text())]


def test_jobs_survive_faults_and_name_the_rank_that_went_first(tmp_path: Path, processes: Any) -> None:
    found = outcomes(tmp_path, KILLS, ["--each", "--kinds=stop", "--steps=24"])
    assert len(found) == 11 and not any(one["wrong"] for one in found)
    assert {one["kind"] for one in found} == {"stop", "kill", "mid-save", "raises"}


@pytest.mark.slow
def test_plug_ins_that_never_return_are_named(tmp_path: Path, processes: Any) -> None:
    found = outcomes(tmp_path, ["--each", "--kinds=keeps_the_interpreter,never_returns", "--steps=24"])
    assert len(found) == 2 and not any(one["wrong"] for one in found)
