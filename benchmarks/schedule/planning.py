"""How long planning, checking and simulating a step takes, from 8 to 1,024 ranks with 64 micro-batches.

    python -m benchmarks.schedule.planning [--microbatches 64] [--ranks 8 16 ... 1024]
    python -m benchmarks.schedule.planning --draw docs/schedules      the pictures of docs/schedules.md

Two families of jobs. "wide": tp 2, pp up to 16, the rest dp, a vision encoder on the same ranks and an audio
encoder on ranks of its own; many ranks share a program. "deep": one pipeline stage a rank, so that no two
share one, the worst case. Prints processor seconds, and microseconds per action of the programs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from parallel.schedule import Costs, Kind, ModuleUse, ScheduleOptions, SchedulePlan, make_schedule, simulate
from parallel.schedule.checker.check import check
from parallel.schedule.drawing.chart import simulated
from parallel.schedule.drawing.draw import draw
from parallel.schedule.drawing.save import save
from parallel.schedule.plan import Params
from parallel.schedule.simulator.costs import USUAL
from parallel.topology.layout import make_layout


def wide(world: int, microbatches: int) -> SchedulePlan:
    """Vision colocated with the language model, audio on the other half of the ranks (a power of two)."""
    half = world // 2
    upper = f"{half}-{world - 1}"
    specs: dict[str, dict[str, Any]] = {
        "vision": {"ranks": upper},
        "audio": {"ranks": f"0-{half - 1}"},
        "llm": {"ranks": upper, "pp": min(16, half // 2), "tp": 2},
    }
    modules = {m: ModuleUse(make_layout(m, world, spec)) for m, spec in specs.items()}
    active = [{"vision", "audio"} if i % 3 else {"vision"} for i in range(microbatches)]
    return make_schedule("auto", modules, sink="llm", active=active)


def deep(world: int, microbatches: int) -> SchedulePlan:
    """A pipeline of as many stages as ranks."""
    modules = {"llm": ModuleUse(make_layout("llm", world, {"pp": world}))}
    return make_schedule("zero_bubble", modules, sink="llm", active=[()] * microbatches)


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """(processor seconds of this one process, result): what other processes do does not count."""
    start = time.process_time()
    out = fn()
    return time.process_time() - start, out


PICTURES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "1f1b": (
        "Disjoint: vision in two stages ahead of three of the language model",
        5,
        "auto",
        {"vision": {"ranks": "0-1", "pp": 2}, "llm": {"ranks": "2-4", "pp": 3}},
    ),
    "mixed": (
        "Mixed: vision on the ranks of the language model, audio on a rank of its own",
        5,
        "auto",
        {"vision": {"ranks": "1-4"}, "audio": {"ranks": 0}, "llm": {"ranks": "1-4", "pp": 4}},
    ),
    "fill": (
        "Vision in the idle time of the language model's pipeline",
        4,
        "fill",
        {"vision": {}, "llm": {"pp": 4}},
    ),
    "interleaved": ("Interleaved: two virtual stages a rank", 4, "interleaved", {"llm": {"pp": 4, "vpp": 2}}),
    "zero_bubble": ("Zero-bubble: weight gradients later", 4, "zero_bubble", {"llm": {"pp": 4}}),
    "pairs": (
        "Pairs: a forward and a backward take turns at their expert exchanges",
        4,
        "1f1b",
        {"vision": {}, "llm": {"pp": 2, "ep": 2}},
    ),
}


def pictures(folder: Path) -> None:
    """Draw a step of eight micro-batches for each of PICTURES; one has no audio in every third."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, world, kind, specs) in PICTURES.items():
        costs = Costs(
            {("vision", Kind.FORWARD): 0.4, ("vision", Kind.BACKWARD): 0.8, ("audio", Kind.BACKWARD): 1.2}
            | {("llm", k): v / specs["llm"].get("vpp", 1) for k, v in USUAL.items()},
            {("audio", Kind.BOUNDARY_FORWARD): 0.3, ("audio", Kind.BOUNDARY_BACKWARD): 0.3}
            | {("vision", Kind.BOUNDARY_FORWARD): 0.2, ("vision", Kind.BOUNDARY_BACKWARD): 0.2}
            | {("vision", Kind.GATHER): 0.3, ("vision", Kind.GRAD_SYNC): 0.6},
            {("llm", k): (0.2, 0.2) for k in (Kind.FORWARD, Kind.BACKWARD) if name == "pairs"},
        )
        params: Params = "step" if name in ("fill", "pairs") else "each"
        modules = {m: ModuleUse(make_layout(m, world, spec), params=params) for m, spec in specs.items()}
        active = [set(specs) - {"llm"} - ({"audio"} if i % 3 == 0 else set()) for i in range(8)]
        options = ScheduleOptions(ahead=8, costs=costs, overlap_experts=None)
        plan = make_schedule(kind, modules, sink="llm", active=active, options=options)
        check(plan)
        save(draw(simulated(simulate(plan, costs)), title=title), folder / f"{name}.svg")


def main(args: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--draw", type=Path, help="draw pictures into this folder instead")
    options = parser.parse_args(args)
    if options.draw:
        pictures(options.draw)
        return
    print("job   ranks programs  actions in them  of all ranks   plan  check  simulate    sum s  us/action")
    for job in (wide, deep):
        for world in options.ranks:
            make, plan = timed(lambda job=job, world=world: job(world, options.microbatches))
            prove, _ = timed(lambda plan=plan: check(plan))
            run, _ = timed(lambda plan=plan: simulate(plan))
            n, total = sum(len(p) for p in plan.programs), make + prove + run
            print(
                f"{job.__name__:5} {world:5} {len(plan.programs):8} {n:16,} {plan.n_actions:13,} {make:6.2f} "
                f"{prove:6.2f} {run:9.2f} {total:8.2f} {1e6 * total / n:10.1f}"
            )


if __name__ == "__main__":
    main()
