"""Forward and backward of the real default job beside its simulation on as many cores as the machine has.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.schedule.real_job
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.schedule.real_job --layouts dp4 mixed

Only the schedule is timed, from a barrier to the last rank's end: data are read before, nothing is updated.
The simulator gets the same plan, `--cores`, and for each (module, stage, kind) the mean over ranks and
micro-batches of the processor seconds of the thread that ran the action. Waiting costs none. Torch's backward
on a CPU runs in that thread; gloo's threads are extra.

measured, simulated: medians over steps, ms; ratio: median over steps of measured / simulated, with its range.
actions: processor ms of all ranks in what the simulator charges (computations, actions on parameters).
posting: in sends, receives and boundaries, which the simulator takes as free. threads: in all other threads.
all: ratio to a simulation in which every action costs more by (actions + posting + threads) / actions.
others: processor ms that the machine spent on anything else meanwhile (Linux, counted in ticks of 10 ms).
left: as all, the ranks sharing only the cores that others left them, on the average of the step.
"""

from __future__ import annotations

import gc
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch.distributed as dist

from benchmarks import common
from mm.compare.rounds import Run, make_runs
from mm.compare.variants import variants
from mm.config.schema import load_config
from mm.ranks.feed import Prepared
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo, init_distributed
from mm.train.one_step import open_feed
from mm.train.step import run_step
from parallel.schedule import Costs, Kind, Record, simulate
from parallel.schedule.action import POSTED

LAYOUTS = ("dp4", "llm-tp2", "llm-pp2-tp2", "disjoint", "mixed", "llm-zero-bubble")
HEAD = "| layout | measured | simulated | ratio | actions | posting | threads | all | others | left |"
Key = tuple[str, int, Kind]
Seconds = dict[tuple[str, Kind] | tuple[str, int, Kind], float]  # as Costs takes them


class Spent(NamedTuple):
    """One rank's step, in seconds of processor but for wall. actions: by key; process: of all its threads;
    machine: of all that runs on it."""

    wall: float
    process: float
    machine: float
    posting: float
    actions: dict[Key, list[float]]


class Step(NamedTuple):
    """One step of all ranks, in seconds."""

    measured: float
    simulated: float
    simulated_all: float
    simulated_left: float
    actions: float
    posting: float
    threads: float
    others: float


class Clock:
    """Processor seconds of this thread, by what it was doing: (module, stage, kind), for one micro-batch."""

    def __init__(self) -> None:
        self.seen: dict[Key, list[float]] = defaultdict(list)
        self.last = time.thread_time()

    def observe(self, record: Record) -> None:
        """Count what has passed since the action before for this one."""
        action, now = record.action, time.thread_time()
        self.seen[action.module, action.stage, action.kind].append((now - self.last) / action.span)
        self.last = now


def machine_seconds() -> float:
    """Processor seconds that all cores of the machine have been busy for, or taken from it (proc(5))."""
    user, nice, system, _, _, *more = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    return sum(map(int, (user, nice, system, *more))) / os.sysconf("SC_CLK_TCK")


def one_step(job: Job, prepared: Prepared) -> Spent:
    """Forward and backward of every micro-batch; gradients are dropped."""
    dist.barrier()
    start, process, machine = time.perf_counter(), time.process_time(), machine_seconds()
    clock = Clock()
    run_step(job, prepared, train=True, observe=clock.observe)
    process = time.process_time() - process
    dist.barrier()
    wall, machine = time.perf_counter() - start, machine_seconds() - machine
    for stages in job.parts.values():
        for part in stages.values():
            part.zero_grad()
    posting = sum(sum(times) for key, times in clock.seen.items() if key[2] in POSTED)
    return Spent(wall, process, machine, posting, {k: t for k, t in clock.seen.items() if k[2] not in POSTED})


def compare_step(job: Job, prepared: Prepared, spent: Sequence[Spent], cores: int) -> Step:
    """What the ranks spent beside the simulation of the same plan with those costs."""
    plan = job.blueprint.schedule(prepared.plan.active)
    seen: dict[Key, list[float]] = defaultdict(list)
    for one in spent:
        for key, times in one.actions.items():
            seen[key] += times
    actions, posting = sum(map(sum, seen.values())), sum(one.posting for one in spent)
    process = sum(one.process for one in spent)
    costs: Seconds = {key: mean(times) for key, times in seen.items()}
    every: Seconds = {key: seconds * process / actions for key, seconds in costs.items()}
    wall = max(one.wall for one in spent)
    others = max(0.0, max(one.machine for one in spent) - process)
    return Step(
        measured=wall,
        simulated=simulate(plan, Costs(costs, cores=cores)).seconds,
        simulated_all=simulate(plan, Costs(every, cores=cores)).seconds,
        simulated_left=simulate(plan, Costs(every, cores=cores - others / wall)).seconds,
        actions=actions,
        posting=posting,
        threads=process - actions - posting,
        others=others,
    )


def measure(run: Run, rank: RankInfo, steps: int, cores: int) -> list[Step]:
    """`steps` steps of one layout after a first one that pays for caches and lazy set-up."""
    cfg = run.blueprint.cfg
    job = build_job(run.blueprint, rank)
    data = open_data(job, open_index(run.blueprint, cfg.data.train, cfg.base))
    feed = open_feed(job, data)
    out = []
    try:
        for step in range(steps + 1):
            prepared, _ = feed.next(step, step + 1)  # nothing is read ahead while a step is timed
            spent: list[Spent] = [None] * rank.world  # type: ignore[list-item]
            dist.all_gather_object(spent, one_step(job, prepared))
            if step:
                out.append(compare_step(job, prepared, spent, cores))
    finally:
        feed.close()
        data.assembler.reader.close()
    job.close()
    gc.collect()
    return out


def row(name: str, steps: Sequence[Step]) -> str:
    """A row of the table; times in ms."""
    ms = {
        field: f"{median(getattr(s, field) for s in steps) * 1e3:.0f}"
        for field in ("measured", "simulated", "actions", "posting", "threads", "others")
    }
    ratios, every, left = (
        [s.measured / getattr(s, field) for s in steps]
        for field in ("simulated", "simulated_all", "simulated_left")
    )
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    cells = [f"`{name}`", ms["measured"], ms["simulated"], ratio, ms["actions"], ms["posting"], ms["threads"]]
    cells += [f"{median(every):.2f}", ms["others"], f"{median(left):.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", type=Path, default=common.ROOT / "configs" / "digits.yaml")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="names of files in configs/layouts")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="that all ranks share")
    args = parser.parse_args()
    cfg = load_config(args.config)
    files = [common.ROOT / "configs" / "layouts" / f"{name}.yaml" for name in args.layouts]
    rank = init_distributed(cfg)
    try:
        if rank.rank == 0:
            print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}", flush=True)
        for run in make_runs(variants(cfg, files), rank.world):
            steps = measure(run, rank, args.steps, args.cores)
            if rank.rank == 0:
                print(row(run.measured.name, steps), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
