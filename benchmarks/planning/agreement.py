"""Twelve layouts of two models on this machine's gloo: predicted steps and memory beside measured ones.

    python -m benchmarks.planning.agreement [--hardware FILE] [--measured FILE] [--processor] [--json OUT]

Without --hardware the machine is calibrated first, as `python -m mm doctor --calibrate` does. --measured:
what an earlier run wrote with --json, in place of running the jobs. --processor compares processor seconds of
all ranks in place of wall time: on a machine that other programs load these change least. Below 15 minutes on
two idle cores. What the table says is in docs/planning.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.planning.jobs import Measured, blueprint_of
from mm.predict.costs import processor_seconds_of
from mm.predict.count.job import count_job
from mm.predict.hardware import Hardware, load_hardware
from mm.predict.here import measured as calibrated
from mm.predict.step import drawn_plans, predict
from mm.ranks.job import open_index

WORLD = 4
DRAWN = 3  # steps whose predictions are averaged, as many as are timed in a round
LAYOUTS = {
    "digits": ("dp4", "llm-tp2", "llm-pp2-tp2", "disjoint", "mixed", "audio-tp4-llm-ep4"),
    "many-images": (
        "homogeneous-dp4",
        "homogeneous-tp2-dp2",
        "homogeneous-tp4",
        "homogeneous-tp4-sp",
        "heterogeneous",
        "heterogeneous-sp",
    ),
}
FOLDERS = {"digits": "layouts", "many-images": "many-images"}


class Row(NamedTuple):
    """One layout; seconds of a step, and bytes of the fullest rank."""

    name: str
    measured_s: float
    predicted_s: float
    measured_bytes: float
    predicted_bytes: float


def run_jobs(config: str, out: Path) -> list[Measured]:
    """Time the layouts of a config on ranks of their own."""
    if config == "many-images" and not list((common.ROOT / "runs" / "many-images-data").glob("*.tar")):
        subprocess.run([sys.executable, "-m", "benchmarks.placement.many_images"], check=True)
    folder = common.ROOT / "configs" / FOLDERS[config]
    layouts = [str(folder / f"{name}.yaml") for name in LAYOUTS[config]]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(WORLD), "-m", "benchmarks.planning.jobs", str(out)]
    command += [str(common.ROOT / "configs" / f"{config}.yaml"), *layouts]
    subprocess.run(
        command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    )
    return [Measured(**row) for row in json.loads(out.read_text())]


def row_of(found: Measured, hardware: Hardware, *, processor: bool) -> Row:
    """A layout's prediction, the mean over the steps that were timed, beside its measure."""
    config, layout = Path(found.config), Path(found.layout)
    blueprint = blueprint_of(config, layout, WORLD)
    index = open_index(blueprint, blueprint.cfg.data.train, blueprint.cfg.base)
    first, *plans = drawn_plans(blueprint, index, DRAWN + 1)
    memory = predict(blueprint, first, hardware)  # the step that the recorder watched
    seconds = []
    for plan in plans:
        if processor:
            seconds.append(processor_seconds_of(blueprint, plan, count_job(blueprint, plan), hardware))
        else:
            seconds.append(predict(blueprint, plan, hardware).step_s)
    return Row(
        name=f"{config.stem}, {layout.stem}",
        measured_s=median(found.processor if processor else found.wall),
        predicted_s=sum(seconds) / len(seconds),
        measured_bytes=max(sum(kinds.values()) for kinds in found.memory),
        predicted_bytes=memory.peak_memory_bytes - hardware.memory.reserved,
    )


def ranks_of(values: list[float]) -> list[int]:
    """The place of each value among them."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(k) for k in range(len(values))]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of values without ties."""
    n = len(a)
    squares = sum((x - y) ** 2 for x, y in zip(ranks_of(a), ranks_of(b), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def table(rows: list[Row]) -> str:
    """Of the docs, with signed errors."""
    lines = ["| layout | measured | predicted | error | memory | predicted | error |", "|---" * 7 + "|"]
    for r in rows:
        cells = [f"{r.measured_s * 1e3:.0f} ms", f"{r.predicted_s * 1e3:.0f} ms"]
        cells += [f"{r.predicted_s / r.measured_s - 1:+.1%}", f"{r.measured_bytes / 2**20:.1f} MiB"]
        cells += [f"{r.predicted_bytes / 2**20:.1f} MiB", f"{r.predicted_bytes / r.measured_bytes - 1:+.1%}"]
        lines.append(f"| {r.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """What is asked for, in one line."""
    times = [abs(r.predicted_s / r.measured_s - 1) for r in rows]
    sizes = [abs(r.predicted_bytes / r.measured_bytes - 1) for r in rows]
    correlation = rank_correlation([r.measured_s for r in rows], [r.predicted_s for r in rows])
    return (
        f"rank correlation {correlation:.2f}; error of steps: median {median(times):.1%}, most "
        f"{max(times):.1%}; of memory: median {median(sizes):.1%}, most {max(sizes):.1%}"
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--hardware", type=Path, help="a hardware file; by default the machine is calibrated")
    parser.add_argument("--measured", type=Path, nargs="+", help="measures of an earlier run")
    parser.add_argument("--processor", action="store_true", help="compare processor seconds, not wall time")
    parser.add_argument("--json", type=Path, help="write the measures")
    args = parser.parse_args()
    if args.hardware is None:
        hardware, lines = calibrated(lambda what: print(what, file=sys.stderr, flush=True))
        print("\n".join(lines), file=sys.stderr)
    else:
        hardware = load_hardware(args.hardware)
    found: list[Measured] = []
    if args.measured:
        raw: list[dict[str, Any]] = [row for path in args.measured for row in json.loads(path.read_text())]
        found = [Measured(**row) for row in raw]
    else:
        with tempfile.TemporaryDirectory() as folder:
            for config in LAYOUTS:
                found += run_jobs(config, Path(folder) / "out.json")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(m) for m in found], indent=1))
    rows = [row_of(m, hardware, processor=args.processor) for m in found]
    print(f"{table(rows)}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()
