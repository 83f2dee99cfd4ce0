"""A shipped comparison: every homogeneous layout that its model allows, against the heterogeneous ones.

    python -m benchmarks.placement.shipped NAME [--rounds 4] [--steps 5]        NAME: see COMPARISONS

First each homogeneous layout is timed in one round: all degrees tp, cp, pp and dp whose product is the number
of ranks or divides it (the other ranks stay idle), equal for all modules, with and without sequence
parallelism, expert parallelism where there are experts, every policy of data ranks, 1, 2 and 4
micro-batches, every schedule where there are stages, and then the encoders whole on
the ranks of the first stage too. None is left out but those that are refused, which are listed with the
reason. The three fastest are then compared with the layouts in configs/NAME/, of which there are few: the
baseline is tuned harder than what challenges it. Rounds are interleaved. The data is made first.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import common
from mm.compare.variants import variants
from mm.config.schema import Config, load_config
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from parallel.topology.data_parallel import POLICIES

FINALISTS = 3
SCHEDULES = ("1f1b", "gpipe", "zero_bubble")
Mapping = dict[str, Any]


class Shipped(NamedTuple):
    """A comparison. made_by: the module that makes its data, with its arguments."""

    made_by: str


PICTURES = "benchmarks.placement.many_images"
COMPARISONS = {
    "wide-tp": Shipped(f"{PICTURES} --out runs/wide-tp-data --pictures 48"),
    "long-context": Shipped(f"{PICTURES} --out runs/long-context-data --pictures 8 --text 2000"),
    "pipeline": Shipped(f"{PICTURES} --out runs/pipeline-data --pictures 8 --side 16 --samples 24"),
    "no-gain": Shipped(f"{PICTURES} --out runs/no-gain-data --pictures 2 --side 16 --samples 96"),
}


def homogeneous(cfg: Config, world: int) -> Iterator[tuple[str, Mapping]]:
    """(name, layout file) of every layout in which all modules have equal degrees on equal ranks."""
    modules = [*cfg.model, "llm"]
    for n in _divisors(world):
        for tp, cp, pp in itertools.product(_divisors(n), repeat=3):
            if n % (tp * cp * pp):
                continue
            dp = n // (tp * cp * pp)
            one = {"ranks": f"0-{n - 1}", "tp": tp, "cp": cp, "pp": pp}
            name = "-".join(f"{k}{v}" for k, v in (("tp", tp), ("cp", cp), ("pp", pp), ("dp", dp)) if v > 1)
            for more, spec in _variations(cfg, one, dp):
                llm = {k: v for k, v in spec.items()}
                others = {k: v for k, v in spec.items() if k != "ep"}
                layout = {m: llm if m == "llm" else others for m in modules}
                for run, schedule in _schedules(cfg, pp):
                    full = "-".join(x for x in (name or "one-rank", more, run) if x)
                    yield full, {"layout": layout, "schedule": schedule}
                    if pp > 1:
                        first = {**others, "ranks": f"0-{n // pp - 1}", "pp": 1}
                        there = {m: llm if m == "llm" else first for m in modules}
                        yield f"{full}-first-stage", {"layout": there, "schedule": schedule}


def _variations(cfg: Config, one: Mapping, dp: int) -> Iterator[tuple[str, Mapping]]:
    """What else a layout can differ in: sequence parallelism, experts, the policy of data ranks."""
    world = dp * one["tp"] * one["cp"]
    experts = _divisors(world) if "E" in cfg.llm.get("pattern", "E") else [1]
    policies = [p for p in POLICIES if p not in ("auto", "hsdp")] if dp * one["cp"] > 1 else ["auto"]
    for sp, ep, policy in itertools.product((False, True)[: one["tp"]], experts, policies):
        found = ["sp" if sp else "", f"ep{ep}" if ep > 1 else "", policy if policy != "auto" else ""]
        spec = {**one, "sequence_parallel": sp, "ep": ep, "data_parallel": policy}
        yield "-".join(x for x in found if x), spec


def _schedules(cfg: Config, pp: int) -> Iterator[tuple[str, Mapping]]:
    """Micro-batches, and the kinds of schedule where there are stages."""
    counts = [n for n in (1, 2, 4) if n <= cfg.train.global_batch]
    for n, kind in itertools.product(counts, SCHEDULES if pp > 1 else ("auto",)):
        name = "-".join([f"mb{n}"] * (len(counts) > 1) + [kind] * (kind != "auto"))
        yield name, {"microbatches": n, "kind": kind}


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def written(cfg: Config, folder: Path) -> tuple[list[Path], list[str]]:
    """Files of the homogeneous layouts that the model allows, and of the others why not."""
    folder.mkdir(parents=True, exist_ok=True)
    files, refused = [], []
    for name, mapping in homogeneous(cfg, cfg.run.nproc):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(mapping))
        try:
            draw_up(variants(cfg, [path])[0].cfg, cfg.run.nproc)
        except Refused as error:
            refused.append(f"{name}: {str(error).removeprefix(f'{path}: ')}")
            path.unlink()
        else:
            files.append(path)
    return files, refused


def compared(config: Path, files: list[Path], out: Path, *options: str) -> list[Mapping]:
    """The runs of `python -m mm compare` of these layouts."""
    command = [sys.executable, "-m", "mm", "compare", str(config), *options, f"--json={out}"]
    subprocess.run([*command, "--layouts", *map(str, files)], check=True)
    runs: list[Mapping] = json.loads(out.read_text())["runs"]
    return runs


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("--rounds", type=int, default=4, help="of the finals (default 4)")
    parser.add_argument("--steps", type=int, default=5, help="of a round of the finals (default 5)")
    args = parser.parse_args()
    one, config = COMPARISONS[args.name], common.ROOT / "configs" / f"{args.name}.yaml"
    folder, cfg = Path("runs") / args.name, load_config(config)
    subprocess.run([sys.executable, "-m", *shlex.split(one.made_by)], check=True)
    files, refused = written(cfg, folder / "homogeneous")
    print("refused:", *refused, sep="\n  ")
    quick = compared(config, files, folder / "homogeneous.json", "--steps=3", "--rounds=1", "--no-watch")
    quick.sort(key=lambda run: run["step_s"]["median"])
    best = [Path(run["file"]) for run in quick[:FINALISTS]]
    ours = sorted((common.ROOT / "configs" / args.name).glob("*.yaml"))
    options = (f"--steps={args.steps}", f"--rounds={args.rounds}")
    finals = compared(config, [*best, *ours], folder / "finals.json", *options)
    base = min(finals[:FINALISTS], key=lambda run: run["step_s"]["median"])
    challenger = min(finals[len(best) :], key=lambda run: run["step_s"]["median"])
    ratio = base["step_s"]["median"] / challenger["step_s"]["median"]
    print(
        f"\n{args.name}: {len(files)} homogeneous layouts on {cfg.run.nproc} ranks, best {base['name']} "
        f"{base['step_s']['median']:.3f} s; heterogeneous, best {challenger['name']} "
        f"{challenger['step_s']['median']:.3f} s: {ratio:.2f}x ({folder / 'finals.json'})"
    )


if __name__ == "__main__":
    main()
