"""Whole jobs as a user starts them: torchrun, signals, exit codes, damage."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.mm.harness import CONFIGS, small
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


def mm(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mm", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def alone(rank: int, config: Path, seconds: float) -> subprocess.Popen[str]:
    """One of two ranks, started without a launcher and without the other."""
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mm", "train", str(config), f"run.timeout_s={seconds}"],
        cwd=ROOT,
        env={**environment(), **place, "MASTER_PORT": str(free_port())},
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where the system does not tell."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in tasks.read_text().split()] if tasks.exists() else []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_job_writes_its_files_and_two_torchrun_agents_do_the_same(tmp_path: Path) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    config = sensor_config(tmp_path, layout={"llm": {"tp": 2}})
    done = mm("train", "train.steps=2", str(config), "--nproc", "4")
    assert done.returncode == 0, done.stderr
    alone = metrics(tmp_path)
    for name in ("config.yaml", "plan.json", "log.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0
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
                "--nproc-per-node=2",
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


def test_damaged_samples_are_named_replaced_and_counted(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "sensor-000000.tar", sensor_samples(12))
    config = sensor_config(tmp_path)
    raw = yaml.safe_load(config.read_text())
    raw["data"].pop("eval")
    config.write_text(yaml.safe_dump(raw))
    assert mm("data", "index", str(shard)).returncode == 0
    payload = bytearray(shard.read_bytes())
    at = payload.index(b"level ")
    payload[at] ^= 1  # the json of the first sample no longer matches the index
    shard.write_bytes(bytes(payload))
    done = mm("train", str(config), "train.steps=2", "train.global_batch=12")
    assert done.returncode == 0, done.stderr
    assert "s000" in done.stderr and "sha256" in done.stderr
    assert metrics(tmp_path)[0]["skipped_items"] == 1


def test_a_data_set_without_a_readable_sample_ends_with_code_3(tmp_path: Path) -> None:
    samples = [{"key": "k", "segments": [{"sensor": "gone.npy"}], "parts": {"x.npy": npy(ONE)}}]
    write_shard(tmp_path / "sensor-000000.tar", samples)
    done = mm("train", str(sensor_config(tmp_path)))
    assert done.returncode == 3 and "gone.npy" in done.stderr and "Traceback" not in done.stderr


def test_a_gradient_that_is_not_finite_ends_all_ranks_with_code_5(tmp_path: Path) -> None:
    samples = sensor_samples(12)
    for sample in samples:
        sample["parts"] = {k: npy(ONE * float("inf")) for k in sample["parts"]}
    write_shard(tmp_path / "sensor-000000.tar", samples)
    done = mm("train", str(sensor_config(tmp_path)))
    assert done.returncode == 5 and "not finite on rank" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_to_every_process_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(20))
    config = sensor_config(tmp_path, checkpoint={"every": 1000})
    words = ["train", str(config), "train.steps=100000"]
    job = subprocess.Popen(
        [sys.executable, "-m", "mm", *words], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
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
    "nearest: tp=": ["train", "configs/digits.yaml", "layout.llm.tp=3"],
    "ranks 0-7": ["train", "configs/digits.yaml", "layout.llm.ranks=0-7"],
    "did you mean 'vit'?": ["train", "configs/digits.yaml", "model.vision.encoder=vti"],
    "key=value": ["train", "configs/digits.yaml", "=3"],
    "n_experts is 6": ["train", "configs/digits.yaml", "model.llm.n_experts=6", "layout.llm.ep=4"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_in_a_sentence(words: list[str], capsys: Any) -> None:
    from mm.cli import main

    expected = next(k for k, v in REFUSED.items() if v is words)
    assert main(words) == 2
    message = capsys.readouterr().err
    wanted = "no config file" if expected == "no such file" else expected.replace("ranks 0-7", "'0-7'")
    assert wanted in message and "Traceback" not in message


def test_a_sample_longer_than_the_context_is_named(capsys: Any) -> None:
    from mm.cli import main

    assert main(["train", "configs/digits.yaml", "--dry-run", "data.context=20"]) == 3
    assert "a00000" in capsys.readouterr().err


def test_missing_shards_are_named(capsys: Any) -> None:
    from mm.cli import main

    assert main(["train", "--dry-run", "data.train=[data/none-*.tar]", "configs/digits.yaml"]) == 3
    assert "none-*.tar" in capsys.readouterr().err


def test_dry_run_prints_the_plan(capsys: Any) -> None:
    from mm.cli import main

    assert main(["train", "configs/digits.yaml", "layout.llm.tp=4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("rank", "edge vision -> llm", "KiB", "GFLOP", "backward(llm, 0, last)"):
        assert text in out


def test_ranks_that_do_not_come_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "sensor-0.tar", sensor_samples(4))
    config = sensor_config(tmp_path)
    first, second = (alone(rank, config, 3) for rank in (0, 1))
    told = [p.communicate(timeout=120)[1] for p in (first, second)]
    assert "1 of 2 ranks have not come within 3 s (run.timeout_s): 1; start all of them" in told[0]
    assert "rank 1 does not reach the job's store at 127.0.0.1:" in told[1], told[1][-1500:]
    assert (first.returncode, second.returncode) == (1, 1) and "Traceback" not in "".join(told)
