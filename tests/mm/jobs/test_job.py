"""Whole jobs as a user starts them: torchrun, signals, exit codes, damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from mm.cli import main
from tests.mm.harness import CONFIGS, Ended, free_port, run_job, run_rank, small
from tests.mm.pages.strict_parser import Checked
from tests.mm.shards import npy, sensor_samples, write_shard

ROOT = CONFIGS.parent
ONE = np.ones((4, 3))


def environment() -> dict[str, str]:
    started = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{k: v for k, v in os.environ.items() if k not in started}, "OMP_NUM_THREADS": "1"}


def sensor_config(folder: Path, **sections: Any) -> Path:
    """A config of a sensor and a small language model over a shard in `folder`."""
    raw = small(
        data={"train": ["sensor-*.tar"], "eval": ["sensor-*.tar"]},
        run={"dir": str(folder / "run"), "nproc": 2},
        eval={"samples": 6},
        **sections,
    )
    sensor = {"encoder": "examples.sensor_encoder:SensorEncoder", "projector": {"hidden": 24}}
    raw["model"] = {"sensor": sensor, "llm": raw["model"]["llm"]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def mm(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mm", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where the system does not list them."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in tasks.read_text().split()] if tasks.exists() else []


def test_a_job_writes_its_files_and_two_torchrun_agents_do_the_same(tmp_path: Path, processes: None) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    config = sensor_config(tmp_path, layout={"llm": {"tp": 2}})
    done = mm("train", "train.steps=2", "run.report=true", str(config), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    alone = metrics(tmp_path)
    assert "2 of 2 steps" in "".join(Checked((tmp_path / "run" / "report.html").read_text()).said)
    for name in ("config.yaml", "plan.json", "log.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    out = done.stdout.splitlines()
    assert out[0] == f"{config}: starting 2 ranks on this machine, run folder {tmp_path}/run"
    for line in ("all 2 ranks have started", "ranks     2 on cpu, messages by gloo"):
        assert out.count(line) == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "training data: 20 samples" in log and "evaluation data: 20 samples" in log
    contract = "step loss tokens lr grad_norm grad_norm_by_module step_s tokens_per_s tflops_per_device "
    contract += "flops_by_module peak_memory_bytes data_s boundary skipped_items"
    assert set(contract.split()) <= set(alone[0])
    assert set(alone[-1]["modality_lift"]) == {"sensor"} and "eval_loss" in alone[-1]
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc-per-node=1",
                f"--node-rank={node}",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
                "-m",
                "mm",
                "train",
                str(config),
                "train.steps=2",
            ],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    errors = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [a.returncode for a in agents] == [0, 0], errors
    assert [r["loss"] for r in metrics(tmp_path)[:2]] == [r["loss"] for r in alone[:2]]


def test_damaged_samples_are_named_replaced_and_counted(tmp_path: Path, ranks: Any) -> None:
    shard = write_shard(tmp_path / "sensor-000000.tar", sensor_samples(12))
    config = sensor_config(tmp_path)
    assert main(["data", "index", str(shard)]) == 0
    payload = bytearray(shard.read_bytes())
    at = payload.index(b"level ")
    payload[at] ^= 1  # the json of the first sample no longer matches the index
    shard.write_bytes(bytes(payload))
    argv = ["train", str(config), "train.steps=2", "train.global_batch=12", "eval.every=1"]
    ended = ranks(2, run_rank, argv, free_port())
    err = "".join(e.err for e in ended)
    assert [e.code for e in ended] == [0, 0], err
    assert "s000" in err and "sha256" in err
    for text in (ended[0].out, (tmp_path / "run" / "log.txt").read_text()):
        assert "training data: 12 samples" in text and "sensor-000000.tar: 12 samples" in text
    assert metrics(tmp_path)[0]["skipped_items"] == 1
    found = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert all((s["key"], s["shard"]) == ("s000", str(shard)) and "sha256" in s["why"] for s in found)
    # Two evaluations name the sample once.
    assert [(s["step"], s.get("evaluation")) for s in found] == [(1, None), (1, True)]
    assert err.count("not evaluated: sample s000") == 1
    assert sum("eval_loss" in record for record in metrics(tmp_path)) == 2


def test_a_data_set_without_a_readable_sample_ends_with_code_3(tmp_path: Path, ranks: Any) -> None:
    samples = [{"key": "k", "segments": [{"sensor": "gone.npy"}], "parts": {"x.npy": npy(ONE)}}]
    write_shard(tmp_path / "sensor-000000.tar", samples)
    ended = ranks(2, run_rank, ["train", str(sensor_config(tmp_path))], free_port())
    assert [e.code for e in ended] == [3, 3]
    err = "".join(e.err for e in ended)
    assert "gone.npy" in err and "Traceback" not in err


def test_a_gradient_that_is_not_finite_ends_all_ranks_with_code_5(tmp_path: Path, ranks: Any) -> None:
    samples = sensor_samples(12)
    for sample in samples:
        sample["parts"] = {k: npy(ONE * float("inf")) for k in sample["parts"]}
    write_shard(tmp_path / "sensor-000000.tar", samples)
    ended = ranks(2, run_rank, ["train", str(sensor_config(tmp_path))], free_port())
    assert [e.code for e in ended] == [5, 5]
    err = "".join(e.err for e in ended)
    assert err.count("not finite on rank") == 1 and "Traceback" not in err


def test_a_signal_to_every_process_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path: Path, processes: None
) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    config = sensor_config(tmp_path, checkpoint={"every": 1000})
    argv = ["train", str(config), "train.steps=100000"]
    job = subprocess.Popen(
        [sys.executable, "-m", "mm", *argv], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # A scheduler's end of job; each rank hears it twice, since the launcher sends it on.
    for pid in [*children(job.pid), job.pid]:
        os.kill(pid, signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "stopped by a signal" in out
    assert len(list((tmp_path / "run").glob("step-*"))) == 1


REFUSED = {
    "no such file": ["train", "configs/nothing.yaml"],
    "did you mean steps?": ["train", "configs/digits.yaml", "train.stepz=1"],
    "did you mean heads?": ["train", "configs/digits.yaml", "model.vision.options.head=1"],
    "nearest: layout.llm.tp=": ["train", "configs/digits.yaml", "layout.llm.tp=3"],
    "ranks 0-7": ["train", "configs/digits.yaml", "layout.llm.ranks=0-7"],
    "did you mean 'vit'?": ["train", "configs/digits.yaml", "model.vision.encoder=vti"],
    "key=value": ["train", "configs/digits.yaml", "=3"],
    "n_experts is 6": ["train", "configs/digits.yaml", "model.llm.n_experts=6", "layout.llm.ep=4"],
}


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_in_a_sentence(argv: list[str], capsys: Any) -> None:
    expected = next(k for k, v in REFUSED.items() if v is argv)
    assert main([*argv, "--dry-run"]) == 2
    message = capsys.readouterr().err
    wanted = "no config file" if expected == "no such file" else expected.replace("ranks 0-7", "'0-7'")
    assert wanted in message and "Traceback" not in message


def test_a_sample_longer_than_the_context_is_named(capsys: Any) -> None:
    assert main(["train", "configs/digits.yaml", "--dry-run", "data.context=20"]) == 3
    assert "a00000" in capsys.readouterr().err


def test_missing_shards_are_named(capsys: Any) -> None:
    assert main(["train", "--dry-run", "data.train=[data/none-*.tar]", "configs/digits.yaml"]) == 3
    assert "none-*.tar" in capsys.readouterr().err


def test_dry_run_prints_the_plan(capsys: Any) -> None:
    assert main(["train", "configs/digits.yaml", "layout.llm.tp=4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("rank", "edge vision -> llm", "KiB", "GFLOP", "backward(llm, 0, last)"):
        assert text in out


def alone_at_a_port(config: str, ports: list[int]) -> Ended:
    """A rank that looks for the other one at a port where it is not."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    return run_job(["train", config, "run.timeout_s=3"], ports[rank], rank, 2)


def test_ranks_that_do_not_come_are_named(tmp_path: Path, ranks: Any) -> None:
    write_shard(tmp_path / "sensor-0.tar", sensor_samples(4))
    first, second = ranks(2, alone_at_a_port, str(sensor_config(tmp_path)), [free_port(), free_port()])
    assert "1 of 2 ranks have not come within 3 s (run.timeout_s): 1; start all of them" in first.err
    assert "rank 1 does not reach the job's store at 127.0.0.1:" in second.err, second.err[-1500:]
    assert (first.code, second.code) == (1, 1) and "Traceback" not in first.err + second.err
