"""Real jobs with real faults. `python -m tests.faults` makes more of them (docs/faults.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.mm.jobs.test_job import ROOT, environment


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults", "--seed", "5", "--json", str(out), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_jobs_survive_faults_and_name_the_rank_that_went_first(tmp_path: Path, processes: Any) -> None:
    # Hangs take the time of their time-outs, so both run at once.
    kinds = {
        "hangs": ["--each", "--kinds=stop,keeps_the_interpreter,never_returns", "--steps=24"],
        "kills": ["--faults=10", "--kinds=kill,mid-save,kill,raises", "--steps=48"],
    }
    suites = {name: start(tmp_path / name, *arguments) for name, arguments in kinds.items()}
    said = {name: suite.communicate(timeout=500)[0] for name, suite in suites.items()}
    assert {name: suite.returncode for name, suite in suites.items()} == {"hangs": 0, "kills": 0}, said
    found = [one for name in kinds for one in json.loads((tmp_path / name).read_text())]
    assert len(found) == 13 and not any(one["wrong"] for one in found)
    assert {one["kind"] for one in found} == {
        "stop", "keeps_the_interpreter", "never_returns", "kill", "mid-save", "raises"
    }  # fmt: skip
