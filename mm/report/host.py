"""Facts on the machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from mm.ranks.memory import host_memory

CPUS = Path("/proc/cpuinfo")


def host_facts(device: torch.device, backend: str) -> dict[str, str | int | float]:
    """By name, facts on this machine now. device: a rank's; backend: of its messages."""
    found: dict[str, str | int | float] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 2),
        "memory_bytes": host_memory() or 0,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": backend,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        found["polyrank"] = metadata.version("polyrank")
    except metadata.PackageNotFoundError:
        found["polyrank"] = "from its checkout"
    return found


def processor() -> str:
    """The name of the first processor; its architecture where the system does not say."""
    if CPUS.exists():
        for line in CPUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
