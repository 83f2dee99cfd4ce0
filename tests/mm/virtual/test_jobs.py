"""Whole jobs without hardware: every rank of a small one matched, one rank of a large one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mm import cli
from mm.config.schema import from_mapping
from mm.plan.blueprint import Blueprint, draw_up
from mm.virtual import match, match_all, virtual_data, virtual_rank
from tests.mm.harness import CONFIGS, small
from tests.mm.virtual.changes import changes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DIGITS = str(CONFIGS / "digits.yaml")
KEYS = ("rank", "world", "peak_memory_bytes", "memory_by_kind", "memory_by_module", "flops_by_module")
JOBS: dict[str, dict[str, Any]] = {
    "colocated": {"llm": {"tp": 2, "pp": 2, "ep": 2, "sequence_parallel": True}, "vision": {"tp": 2}},
    "disjoint": {
        "vision": {"ranks": "0-2"},
        "audio": {"ranks": 3},
        "llm": {"ranks": "4-7", "tp": 2, "ep": 4, "cp": 2},
    },
}


def blueprint_of(layout: dict[str, Any], world: int, **sections: Any) -> Blueprint:
    raw = small(layout=layout, schedule={"microbatches": 2}, train={"dtype": "float32"}, **sections)
    return draw_up(from_mapping(raw, CONFIGS), world)


@pytest.mark.parametrize("name", JOBS)
def test_every_call_of_eight_ranks_meets_its_peers(name: str) -> None:
    blueprint = blueprint_of(JOBS[name], 8)
    traces, result = match_all(blueprint, CPU, skew=1.5)
    assert result.ok, result.problems
    assert result.calls == sum(len(t.calls) for t in traces)
    assert not dist.is_initialized()
    for trace in traces:
        memory = trace.memory
        assert sum(memory.by_kind.values()) == sum(memory.by_module.values()) == memory.peak > 0
    assert sum(bool(c.sends) for t in traces for c in t.calls) > 0  # rows went to experts elsewhere
    # One call of one rank is changed, in each of many ways: it is found.
    rng = np.random.default_rng(0)
    for k, other in enumerate(changes(traces[-1], rng)):
        assert not match([*traces[:-1], other], buffered=True).ok, k


def test_made_up_samples_stand_in_for_missing_data() -> None:
    blueprint = blueprint_of({}, 2, data={"train": ["nowhere/*.tar"], "context": 96})
    data = virtual_data(blueprint)
    assert "ragged lengths" in data.note and "nowhere" in data.note
    assert len({sum(s.tokens for s in sample.segments) for sample in data.index.samples}) > 1
    trace = virtual_rank(blueprint, 1, CPU, data=data)
    assert set(trace.flops_by_module) == {"vision", "audio", "llm"}
    assert data.note in trace.notes


def test_memory_of_a_rank_falls_as_its_shards_do() -> None:
    shares = [_weights(blueprint_of({}, world), world) for world in (2, 8)]
    assert shares[0]["optimizer"] == pytest.approx(4 * shares[1]["optimizer"], rel=0.15)


def _weights(blueprint: Blueprint, world: int) -> dict[str, int]:
    trace = virtual_rank(blueprint, world - 1, CPU, data=virtual_data(blueprint))
    return dict(trace.memory.by_kind)


def test_the_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "virtual.json"
    argv = ["train", DIGITS, "--virtual", "3", "--world", "4", "--json", str(out), "run.device=cpu"]
    assert cli.main(argv) == 0
    found = json.loads(out.read_text())
    assert set(KEYS) <= found.keys() and (found["rank"], found["world"]) == (3, 4)
    assert {"op", "group", "members", "bytes", "dtype", "crosses_nodes"} <= found["calls"][0].keys()
    assert {"file", "line", "count"} <= found["host_waits"][0].keys()
    assert sum(found["memory_by_kind"].values()) == found["peak_memory_bytes"]
    assert "peak memory" in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--virtual", "4", "--world", "4"], ["--virtual", "x"], ["--world", "4"]])
def test_what_makes_no_sense_is_refused(given: list[str]) -> None:
    assert cli.main(["train", DIGITS, *given]) == 2


@pytest.mark.parametrize("axes", [("tp=2", "pp=2", "ep=4", "sequence_parallel=true"), ("cp=4", "ep=2")])
def test_the_programs_of_a_large_job_match_on_an_accelerator(
    axes: tuple[str, ...], processes: None, tmp_path: Path, run: Callable[..., Any] = subprocess.run
) -> None:
    out = tmp_path / "programs.json"
    layout = [f"layout.llm.{given}" for given in axes]
    more = ["schedule.microbatches=2", "train.global_batch=16", "train.dtype=bfloat16", "data.context=128"]
    argv = ["train", DIGITS, "--virtual", "programs", "--world", "16", "--json", str(out), *layout, *more]
    done = run([sys.executable, "-m", "mm", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(out.read_text())
    assert found["match"]["ok"] and found["match"]["calls"] > 16 * 10
    waits = {(w["file"], w["why"]) for r in found["ranks"] for w in r["host_waits"]}
    assert ("mm/ranks/control.py", "copy") in waits  # what only an accelerator waits for


def test_a_changed_call_of_one_rank_is_found_where_ranks_stand_for_their_kinds(processes: None) -> None:
    argv = [sys.executable, "-m", "tests.mm.virtual.kinds"]
    done = subprocess.run(argv, cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["kinds"] == [4] * 4
    assert found["changes"] > 60 and found["missed"] == []
    # The only expert layer of the first stage reads its row counts, in each of two micro-batches.
    step = ["update", "mm/ranks/control.py", 1]
    assert found["waits"] == [["step", "parallel/expert_parallel/routing.py", 2], step]
    assert found["padded"] == [step]
    assert found["crossing"] and all(found["hops"]) and all(found["sums"])


RECOMPUTED = """
import sys
from mm import cli
config, out, *given = sys.argv[1:]
sys.exit(cli.main(["train", config, "--virtual", "0", "--world", "4", "--json", out, *given]))
"""


def test_layers_that_are_computed_again_keep_less(tmp_path: Path, processes: None) -> None:
    """On the accelerator's stand-in, whose backward runs in a thread of autograd's."""
    kept = {}
    for given in ("false", "true"):
        out = tmp_path / f"{given}.json"
        command = [sys.executable, "-c", RECOMPUTED, DIGITS, str(out), f"train.recompute={given}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        kept[given] = json.loads(out.read_text())["memory_by_kind"]["activations"]
    assert kept["true"] < 0.5 * kept["false"]
