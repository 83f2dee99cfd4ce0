"""Starting ranks: this machine's by ourselves, or joining those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mm.config import Config
from mm.errors import Refused

if TYPE_CHECKING:
    import torch

GRACE_S = 20.0


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the job and its device."""

    rank: int
    world: int
    device: torch.device


def launched() -> bool:
    """Whether torchrun (or launch_local) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Ranks of the job that this process was started for."""
    return int(os.environ["WORLD_SIZE"])


def launch_local(nproc: int, argv: Sequence[str]) -> int:
    """Run `python -m mm ARGV` as nproc ranks on this machine; returns the exit code of the job.

    When a rank fails the others get a moment to end by themselves, then are stopped. The code is that of the
    first failing rank with a known meaning (2 to 5), else 1. SIGINT and SIGTERM are passed on.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [_start(argv, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(nproc)]

    def forward(number: int, frame: object) -> None:
        for p in ranks:
            with contextlib.suppress(ProcessLookupError):
                p.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(ranks)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # One thread a rank: ranks share the cores, and threads of their own would fight over them.
    return subprocess.Popen(
        [sys.executable, "-m", "mm", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
    )


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    deadline: float | None = None
    while True:
        codes = [p.poll() for p in ranks]
        if all(c is not None for c in codes):
            break
        if deadline is None and any(codes):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for p in ranks:
                p.kill()
        time.sleep(0.05)
    known = [c for c in codes if c in (2, 3, 4, 5)]
    if known:
        return known[0]
    return 1 if any(codes) else 0


def init_distributed(cfg: Config) -> RankInfo:
    """Join the job's default process group. Its waits are bounded by run.timeout_s."""
    import torch
    import torch.distributed as dist

    # Newer torch renames the tensor collectives; the old names are the ones that torch 2.11 has.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    rank, world = int(os.environ["RANK"]), world_size()
    wanted = cfg.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Refused("run.device is cuda but torch sees no CUDA device; use run.device=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        device = torch.device("cpu")
        torch.set_num_threads(1)
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # The backend follows from the device; torch knows which one serves it.
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=cfg.run.timeout_s))
    return RankInfo(rank, world, device)
