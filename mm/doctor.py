"""Examines a machine: what is installed, what works, whether the default job can run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def examine() -> tuple[str, bool]:
    """(report, whether the default job can run here)."""
    import torch

    from encoders import compat

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines.append(f"cores {os.cpu_count()}, free disk {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    lines.append(f"torch {torch.__version__}, device {device}")
    lines.append("packages (pinned, found):")
    healthy = sys.version_info >= (3, 11)
    for name, pinned in pins():
        found = _version(name)
        # torch may be newer or older than the pin where another build serves the machine's accelerator.
        mark = "" if found and found.split("+")[0] == pinned else "   <- differs"
        healthy &= found is not None
        lines.append(f"  {name:<14} {pinned:<10} {found or 'missing'}{mark}")
    for name, how in compat.status().items():
        lines.append(f"{name}: {how}")
    seconds, error = ping()
    lines.append(f"two gloo ranks: {error or f'ok, {seconds:.1f} s to start and greet'}")
    shards = sorted((ROOT / "configs" / "data").glob("*.tar"))
    lines.append(
        f"shipped data: {len(shards)} shards" + ("" if shards else " (run: python -m mm data prepare digits)")
    )
    healthy &= error is None and bool(shards)
    lines.append("the default job can run" if healthy else "the default job cannot run: see above")
    return "\n".join(lines), healthy


def pins() -> list[tuple[str, str]]:
    """(package, version) of the exact pins in pyproject.toml, those of other systems left out."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    out = []
    for text in project["dependencies"]:
        requirement, _, marker = text.partition(";")
        match = re.fullmatch(r"\s*([\w.-]+)==([\w.+]+)\s*", requirement)
        if match and ("linux" not in marker or sys.platform == "linux"):
            out.append((match[1], match[2]))
    return out


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


_PING = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
x = torch.ones(1)
dist.all_reduce(x)
assert x.item() == 2
dist.destroy_process_group()
"""


def ping(timeout_s: float = 60.0) -> tuple[float, str | None]:
    """Seconds for two processes to greet each other over gloo, and what went wrong."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [sys.executable, "-c", _PING, f"{folder}/store"]
        ranks = [subprocess.Popen([*command, str(r)], stderr=subprocess.PIPE, text=True) for r in range(2)]
        try:
            errors = [p.communicate(timeout=timeout_s)[1] for p in ranks]
        except subprocess.TimeoutExpired:
            for p in ranks:
                p.kill()
            return timeout_s, f"no answer within {timeout_s:.0f} s"
        failed = [e.strip().splitlines()[-1] for p, e in zip(ranks, errors, strict=True) if p.returncode]
        return time.monotonic() - start, failed[0] if failed else None
