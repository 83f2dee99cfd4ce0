"""The hardware file of the machine at hand: doctor --calibrate."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from mm.errors import Refused
from mm.predict import calibrate, fit, reference
from mm.predict.costs import processor_seconds_of
from mm.predict.hardware import Hardware, from_mapping

PATIENCE_S = 600.0  # for the reference jobs, on a machine that other programs load too
GUESS = 1e-5  # seconds, before the fit
STDERR = 2  # the number of its file


def measured(say: Callable[[str], object]) -> tuple[Hardware, list[str]]:
    """(the hardware, lines on how well it explains the reference jobs). say: is told what is measured now.

    Raises Refused where the reference jobs do not run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank on the CPU
    try:
        say("products, attention and memory of one core")
        kernels = _kernels()
    finally:
        torch.set_num_threads(threads)
    say(f"messages between 2 and {reference.WORLD} ranks, and {len(reference.JOBS)} reference jobs")
    found = _reference()
    say("fitting")
    hardware = from_mapping(_raw(kernels, found["messages"]), "calibration")
    blueprints = [reference.blueprint_of(t["job"]) for t in found["jobs"]]
    jobs = fit.jobs_of([(b, reference.plan_of(b)) for b in blueprints])
    hardware = fit.fitted(hardware, jobs, [t["processor"] for t in found["jobs"]])
    hardware = fit.with_cores(hardware, jobs, [t["wall"] for t in found["jobs"]])
    return hardware, _residuals(hardware, jobs, found["jobs"])


def _kernels() -> dict[str, Any]:
    peak = {name: max(calibrate.products(d, (384, 768)).values()) for name, d in calibrate.DTYPES.items()}
    products = calibrate.products(torch.float32)
    peak["float32"] = max(peak["float32"], *products.values())
    kinds = {"product": products, "attention": calibrate.attention(torch.float32)}
    kinds["grouped"] = calibrate.grouped(torch.float32)
    kinds["convolution"] = {1: calibrate.convolution(torch.float32)}
    curves = {k: {**calibrate.shares(v, peak["float32"]), "source": MEASURED} for k, v in kinds.items()}
    return {"peak": peak, "curves": curves, "bandwidth": calibrate.bandwidth()}


MEASURED = "measured: python -m mm doctor --calibrate, float32, one thread"
FITTED = "fitted on the processor seconds of reference jobs on four gloo ranks (mm/predict/reference.py)"


def _raw(kernels: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A hardware file, whose fitted figures come later."""
    two = messages[-1]
    return {
        "name": "this machine",
        "memory": {
            "bytes": memory_bytes() / cores(),
            "reserved": 0.0,
            "bandwidth": kernels["bandwidth"],
            "efficiency": 1.0,
            "source": f"bytes: of the machine, a rank a core. bandwidth: {FITTED}",
        },
        "peak": {**kernels["peak"], "source": MEASURED},
        "kernels": {"launch_s": GUESS, "source": f"launch_s: {FITTED}", **kernels["curves"]},
        "links": {
            "inside": {
                "bandwidth": two["rate"],
                "efficiency": 1.0,
                "latency_s": two["latency"],
                "source": "measured: messages to and fro between pairs of four gloo ranks",
            }
        },
        "host": {
            "cores": float(cores()),
            "collective_s": GUESS,
            "message_s": two["message"],
            "byte_s": two["byte"],
            "unit_s": GUESS,
            "step_s": GUESS,
            "source": f"message_s, byte_s: measured as links. cores: those that ranks got. Rest: {FITTED}",
        },
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reference() -> dict[str, Any]:
    """Run the reference jobs on ranks of their own; raises Refused with their last line where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(reference.WORLD), "-m", reference.__name__, str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command,
                env=env,
                stdout=STDERR,  # progress: the file may go to stdout
                stderr=subprocess.PIPE,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"the reference jobs were not done within {PATIENCE_S:g} s") from None
        if done.returncode or not out.is_file():
            lines = [x for x in done.stderr.splitlines() if "Error" in x or "Refused" in x] or ["no message"]
            raise Refused(f"the reference jobs failed: {lines[0].strip()}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _residuals(hardware: Hardware, jobs: list[fit.Job], timed: list[dict[str, Any]]) -> list[str]:
    """By reference job, its processor seconds as measured and as the fit has them."""
    lines = ["reference jobs, processor ms of all ranks: measured, fitted"]
    for job, one in zip(jobs, timed, strict=True):
        layout, microbatches, context, _ = reference.JOBS[one["job"]]
        fits = processor_seconds_of(*job, hardware)
        error = fits / one["processor"] - 1
        name = f"{layout}, {microbatches} x {context} tokens"
        lines.append(f"  {name:<26} {one['processor'] * 1e3:7.0f} {fits * 1e3:7.0f}  {error:+.0%}")
    return lines


def as_yaml(hardware: Hardware, name: str) -> str:
    """A hardware file."""
    raw = _plain(asdict(replace(hardware, name=name)))
    head = f"# {platform.system()} {platform.machine()}, {cores()} cores; gloo over loopback.\n"
    return head + yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=110)


def _plain(value: Any) -> Any:
    """Without what is left out, and with few digits."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
