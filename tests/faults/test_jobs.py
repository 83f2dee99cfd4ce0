"""Real jobs with real faults. `python -m tests.faults` makes more of them (docs/faults.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scenes import SCENES
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


def scenes(tmp_path: Path, *names: str, steps: int = 24) -> None:
    """Play scenes (scenes.py), all of them kinds that this machine can have."""
    missing = {why for name in names if (why := SCENES[name.partition("@")[0]].missing())}
    if missing:
        pytest.skip("; ".join(missing))
    found = outcomes(tmp_path, ["--each", f"--kinds={','.join(names)}", f"--steps={steps}"])
    assert len(found) == len(names) and not any(one["wrong"] for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cable-pulled", "cut-off"])
def test_a_network_that_breaks_between_two_agents_ends_both_sides(
    kind: str, tmp_path: Path, processes: Any
) -> None:
    scenes(tmp_path, *(f"{kind}@{moment}" for moment in SCENES[kind].moments))


@pytest.mark.slow
def test_a_job_goes_on_when_torchrun_starts_its_ranks_again(tmp_path: Path, processes: Any) -> None:
    scenes(tmp_path, "torchrun@step", "torchrun@save", "agent")


@pytest.mark.slow
def test_a_machine_that_is_lost_is_taken_in_again(tmp_path: Path, processes: Any) -> None:
    scenes(tmp_path, "rejoin", steps=60)  # the machine is to come back before the end


@pytest.mark.slow
def test_a_job_survives_a_kill_while_it_resumes(tmp_path: Path, processes: Any) -> None:
    scenes(tmp_path, *(f"during-load@{moment}" for moment in SCENES["during-load"].moments))


@pytest.mark.slow
def test_a_job_keeps_its_checkpoints_whatever_happens_to_its_writers(tmp_path: Path, processes: Any) -> None:
    scenes(tmp_path, "term-during-save", "writer@idle", "writer@saving", "read-only")
