"""`doctor`: what is installed on a machine and works there, if the default job can run, how fast it is."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from mm.commands.command import Command
from mm.errors import Refused

ROOT = Path(__file__).resolve().parents[2]


# What the default job imports. The code has fallbacks for the other pinned packages.
NEEDED = ("torch", "numpy", "pillow", "pydantic", "pyyaml", "rich")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    if args.positional:
        raise Refused(f"doctor takes no arguments, given {' '.join(args.positional)}")
    if args.calibrate:
        return _calibrate(args.out)
    if args.out is not None:
        raise Refused("--out is where --calibrate writes; needed: --calibrate with it")
    text, healthy = examine()
    print(text)
    return 0 if healthy else 1


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine's cores and gloo, and write a hardware file for `plan` (below two minutes "
        "where nothing else runs)",
    )
    parser.add_argument("--out", type=Path, help="the hardware file (default: it is printed)")


COMMAND = Command(_run, "examine this machine: can the default job run, how fast is it?", "none", _options)


def _calibrate(out: Path | None) -> int:
    from mm.predict.here import as_yaml, measured

    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {what}", file=sys.stderr, flush=True)

    if out is not None and not out.parent.is_dir():
        raise Refused(f"--out {out}: there is no folder {out.parent}")
    hardware, lines = measured(say)
    text = as_yaml(hardware, "this-machine" if out is None else out.stem)
    if out is None:
        print(text)
    else:
        out.write_text(text)
    say("done" if out is None else f"written to {out}")
    print("\n".join(lines), file=sys.stderr)
    return 0


def examine() -> tuple[str, bool]:
    """(report, whether the default job can run here). Works where packages are missing, and names them."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines.append(f"cores {os.cpu_count()}, free disk {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB")
    wrong = [] if sys.version_info >= (3, 11) else ["Python is older than 3.11"]
    lines.append("packages (pinned, found):")
    for name, pinned in pins():
        found = _version(name)
        if found is None:
            mark = "   <- needed" if name in NEEDED else "   <- a fallback is used"
        else:
            # Another version of torch is fine where another build serves the machine's accelerator.
            mark = "" if found.split("+")[0] == pinned else "   <- differs"
        lines.append(f"  {name:<14} {pinned:<10} {found or 'missing'}{mark}")
    wrong += [f"{name} is missing (pip install -e .)" for name in NEEDED if _version(name) is None]
    if _version("torch") and _version("numpy"):
        text, fault = _examine_torch()
        lines += text
        wrong += fault
    shards = sorted((ROOT / "configs" / "data").glob("*.tar"))
    lines.append(f"shipped data: {len(shards)} shards")
    if not shards:
        wrong.append("no shipped data (python -m mm data prepare digits --out configs/data)")
    lines.append(f"the default job cannot run: {'; '.join(wrong)}" if wrong else "the default job can run")
    return "\n".join(lines), not wrong


def _examine_torch() -> tuple[list[str], list[str]]:
    """(lines on devices, backends and import paths, what is wrong)."""
    import torch
    import torch.distributed as dist

    count = torch.cuda.device_count()
    devices = ", ".join(sorted({torch.cuda.get_device_name(k) for k in range(count)}))
    lines = [
        f"devices: {f'{count} x {devices}' if count else 'cpu'}, torch built for CUDA {torch.version.cuda}",
        f"threads: {torch.get_num_threads()} (a rank on the CPU uses 1)",
    ]
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    lines.append("backends: " + (", ".join(name for name, there in backends.items() if there) or "none"))
    from encoders import compat

    lines += [f"{name}: {how}" for name, how in compat.status().items()]
    lines.append(f"plug-ins: find both so, before their code is imported; {_transformers()}")
    seconds, error = ping()
    lines.append(f"two gloo ranks: {error or f'ok, {seconds:.1f} s to start and greet'}")
    return lines, [] if error is None else [f"two gloo ranks cannot meet: {error}"]


def _transformers() -> str:
    """Whether the transformers package can be imported, whose models some plug-ins wrap."""
    if (found := _version("transformers")) is None:
        return "transformers is not installed (only some plug-ins want it)"
    try:
        importlib.import_module("transformers.image_utils")  # what their vision models import
    except Exception as error:
        return f"transformers {found} cannot be imported: {str(error).splitlines()[0][:90]}"
    return f"transformers {found} can be imported"


def pins() -> list[tuple[str, str]]:
    """(package, version) of the exact pins in pyproject.toml that apply to this system."""
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
    """(seconds for two processes to start and meet over gloo, what went wrong if anything)."""
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
            return timeout_s, f"no answer within {timeout_s:g} s"
        failed = [e.strip().splitlines()[-1] for p, e in zip(ranks, errors, strict=True) if p.returncode]
        return time.monotonic() - start, failed[0] if failed else None
