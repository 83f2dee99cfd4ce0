"""What a run prints and writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mm.plan.drawn import Count
from mm.plan.step_plan import Imbalance
from mm.plan.subsets import SubsetLoss
from mm.ranks.skipped import Skip
from mm.train.console import Console, step_line
from mm.train.evaluate import Evaluation
from mm.train.metrics import BoundaryMetrics, StepMetrics, TimedStep
from mm.train.stragglers import Slowest

RESULT = Evaluation(0.5, {"vision": 1.2345, "audio": -0.001}, {"vision": 0.1, "audio": 2.3})


def record(step: int) -> TimedStep:
    metrics = StepMetrics(
        step=step,
        loss=1 / 3,
        tokens=123,
        lr=1e-3,
        grad_norm=2.0,
        grad_norm_by_module={"vision": 0.5, "llm": 1.5},
        flops_by_module={"vision": 4.6e8, "llm": 2e9},
        peak_memory_bytes=3 * 2**20,
        data_s=0.004,
        seconds_by_module={"vision": 0.01, "llm": 0.02},
        waited_s_by_module={"vision": [0.001, 0.0]},
        slowest_rank=Slowest(1, "vision", 0.012, 0.011),
        optimizer_s=0.003,
        boundary={"vision": BoundaryMetrics(10, 0.002), "audio": BoundaryMetrics(0, 0.001)},
        objectives={"mtp": 0.25},
        loss_by_modality={"text": SubsetLoss(1 / 4, 10), "vision": SubsetLoss(1 / 2, 5)},
        loss_by_source={"digits": SubsetLoss(1 / 3, 15)},
        drawn_by_source={"digits": Count(7, 90)},
        imbalance={"vision": Imbalance(dealt=1.0, by_sample=1.5)},
        skipped_items=2,
        stop=False,
    )
    return TimedStep(metrics, step_s=0.1, devices=2)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(run_dir: Path, first: int, last: int) -> None:
    console = Console(run_dir, 9, first=first, lead=True)
    for step in range(first + 1, last + 1):
        console.step(record(step))
    console.close()


def test_a_step_is_one_plain_line_and_one_full_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 0, 2)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 2 and "\x1b" not in shown  # not a terminal: no bar, no colours
    assert shown == (tmp_path / "log.txt").read_text()
    assert lines(tmp_path) == [record(1).to_json(), record(2).to_json()]
    assert "0.3333333333333333" in (tmp_path / "metrics.jsonl").read_text()  # floats in full


def test_a_line_of_metrics_has_these_keys_in_this_order() -> None:
    """Other people's scripts read metrics.jsonl."""
    written = json.loads(json.dumps(record(1).to_json()))
    assert ",".join(written) == (
        "step,loss,tokens,lr,grad_norm,grad_norm_by_module,flops_by_module,peak_memory_bytes,data_s,"
        "seconds_by_module,waited_s_by_module,slowest_rank,optimizer_s,boundary,objectives,loss_by_modality,loss_by_source,drawn_by_source,imbalance,skipped_items,step_s,tokens_per_s,"
        "tflops_per_device"
    )
    assert written["boundary"] == {
        "vision": {"bytes": 10, "seconds": 0.002},
        "audio": {"bytes": 0, "seconds": 0.001},
    }
    assert written["imbalance"] == {"vision": {"dealt": 1.0, "by_sample": 1.5}}
    assert written["loss_by_modality"]["vision"] == {"loss": 0.5, "tokens": 5}
    assert written["tokens_per_s"] == 123 / 0.1
    assert written["tflops_per_device"] == (4.6e8 + 2e9) / 0.1 / 2 / 1e12


def test_the_line_says_what_matters() -> None:
    line = step_line(record(7), 400, 65.4)
    for part in (
        "step   7/400",
        "loss 0.3333",
        "vision 0.5 llm 1.5",
        "1230 tok/s",
        "0.0123 TFLOPS/dev",
        "3 MiB",
        "boundary 3.0 ms",
        "data 4.0 ms",
        "ETA 65 s",
    ):
        assert part in line


def test_other_ranks_write_nothing_but_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path / "run", 9, first=0, lead=False)
    console.step(record(1))
    console.info("hello")
    console.evaluation(1, RESULT)
    console.lift_table(RESULT, {"vision": math.log(10)})
    console.warn("sample 3 cannot be read")
    console.close()
    out, err = capsys.readouterr()
    assert out == "" and err == "warning: sample 3 cannot be read\n"
    assert not (tmp_path / "run").exists()


def test_evaluations_are_records_and_a_table_with_a_blind_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(tmp_path, 9, first=0, lead=True)
    console.evaluation(9, RESULT)
    console.lift_table(RESULT, {"vision": math.log(10)})
    console.close()
    assert lines(tmp_path) == [
        {"step": 9, "eval_loss": 0.5, "modality_lift": {"vision": 1.2345, "audio": -0.001}}
    ]
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        row = next(line for line in text.splitlines() if line.startswith("│ vision"))
        assert [cell.strip() for cell in row.strip("│").split("│")] == [
            "vision",
            "0.100",
            "1.335",
            "+1.234",
            "2.303",
        ]


def test_a_new_run_begins_its_files_anew(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)
    run(tmp_path, 0, 1)
    assert [r["step"] for r in lines(tmp_path)] == [1]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)  # killed after step 5, while writing; the checkpoint is of step 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path, 3, 6)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_warnings_go_to_the_log_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path, 9, first=0, lead=True)
    console.warn("sample 3 cannot be read")
    console.close()
    assert "warning: sample 3" in capsys.readouterr().err
    assert "warning: sample 3" in (tmp_path / "log.txt").read_text()


def test_held_out_samples_that_cannot_be_read_are_listed_once_whatever_resumes(tmp_path: Path) -> None:
    skips = [Skip(3, "k", "a.tar", "why", ""), Skip(4, "l", "a.tar", "why", "")]

    def evaluated(first: int, step: int, found: list[Skip]) -> list[tuple[int, str, bool]]:
        console = Console(tmp_path, 9, first=first, lead=True)
        console.skipped(step, found, evaluation=True)
        console.close()
        listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
        return [(s["step"], s["key"], s["evaluation"]) for s in listed]

    assert evaluated(0, 2, skips[:1]) == [(2, "k", True)]
    # It resumes after the first is listed, and finds another; then before that one was.
    assert evaluated(4, 6, skips) == [(2, "k", True), (6, "l", True)]
    assert evaluated(4, 8, skips[1:]) == [(2, "k", True), (8, "l", True)]
