"""Memory of this process and of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OWN = Path("/proc/self")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
RESET_PEAK = "5"  # written to clear_refs (proc_pid_clear_refs(5)): the peak resident set begins anew


def peak_memory(device: torch.device) -> int:
    """Bytes: peak allocated on an accelerator, peak resident set of the process on a CPU, since forget_peak()
    or the start."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _kib(OWN / "status", "VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Have peak_memory() tell of what comes from now on; memory that is free is given back first.

    On a CPU it takes Linux; elsewhere the peak stays that of the whole process.
    """
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Freed memory stays resident until glibc is asked (see launch.ALLOCATOR).
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        (OWN / "clear_refs").write_text(RESET_PEAK)


def device_memory(kind: str) -> int | None:
    """Bytes of one device of this machine, for "cpu" of the whole host; None where it is not known."""
    import torch

    if kind == "cpu":
        return host_memory()
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.device_count() else None


def host_memory() -> int | None:
    """Bytes of memory that all processes here may use together: the machine's, or its container's bound."""
    found = [_kib(Path("/proc/meminfo"), "MemTotal:")]
    for file in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no bound
            found.append(int(file.read_text()))
    return min((n for n in found if n is not None), default=None)


def _kib(file: Path, name: str) -> int | None:
    """Bytes that a line `NAME: N kB` of a file of the kernel's says."""
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
