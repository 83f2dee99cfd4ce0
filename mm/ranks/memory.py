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

OWN = Path("/proc/self")  # this process
# Memory limits of the container: cgroup v2, then v1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
RESET_PEAK = "5"  # written to clear_refs (proc_pid_clear_refs(5)): resets the peak resident set


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since reset_peak() or the start: allocated on an accelerator, resident on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _kib(OWN / "status", "VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Start peak_memory() anew; free memory is returned to the device or the system first.

    On a CPU this needs Linux; elsewhere the peak stays that of the whole process.
    """
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    # glibc keeps freed memory resident until malloc_trim() (see launch.ALLOCATOR).
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        (OWN / "clear_refs").write_text(RESET_PEAK)


def device_memory(kind: str) -> int | None:
    """Bytes of one device of this machine, for "cpu" of the whole host; None where that is unknown."""
    import torch

    if kind == "cpu":
        return host_memory()
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.device_count() else None


def host_memory() -> int | None:
    """Bytes that all processes here may use together: the machine's, or its container's limit if lower."""
    found = [_kib(Path("/proc/meminfo"), "MemTotal:")]
    for file in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            found.append(int(file.read_text()))
    return min((n for n in found if n is not None), default=None)


def _kib(file: Path, name: str) -> int | None:
    """Bytes in the line `NAME: N kB` of a file under /proc; None where it has no such line."""
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
