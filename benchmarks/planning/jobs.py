"""Steps of real jobs on gloo ranks: wall time, processor seconds and measured allocations, written as JSON.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.planning.jobs OUT.json CONFIG LAYOUT ..

benchmarks/planning/agreement.py starts this. A step is timed from a barrier to the last rank's end, its
update included; data are read before. Layouts take turns, round by round, so that other programs on the
machine disturb all of them alike.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from mm.config.schema import Config, load_config, load_layout_file, with_layout
from mm.plan.blueprint import Blueprint, draw_up
from mm.predict.timed import everywhere, timed_step
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo, init_distributed
from mm.train.garbage import set_aside
from mm.train.one_step import open_feed
from mm.virtual.recorder import Recorder
from mm.virtual.run import group_names, record_step

ROUNDS, STEPS = 2, 3  # beside the first step of a round, which pays for caches and is left out


@dataclass(frozen=True)
class Measured:
    """One layout. Seconds of each step: wall; processor: of all threads of all ranks. memory: by rank, bytes
    of live storages at the peak, by kind; of one step that the recorder watched."""

    config: str
    layout: str
    wall: list[float]
    processor: list[float]
    memory: list[dict[str, int]]


def blueprint_of(config: Path, layout: Path, world: int) -> Blueprint:
    """The config under the layout file."""
    cfg = load_config(config)
    return draw_up(with_layout(cfg, *load_layout_file(layout)), world)


def timed(blueprint: Blueprint, rank: RankInfo, measured: Measured, *, memory: bool) -> None:
    """One round of a layout. memory: whether to record a further step's allocations."""
    cfg: Config = blueprint.cfg
    job = build_job(blueprint, rank)
    data = open_data(job, open_index(blueprint, cfg.data.train, cfg.base))
    feed = open_feed(job, data)
    try:
        with set_aside():
            for step in range(STEPS + 1):
                # Nothing is read ahead while a step is timed.
                spent = timed_step(job, step, lambda: feed.next(step, step + 1)[0])  # noqa: B023  # called here
                if step:
                    measured.wall.append(spent.wall)
                    measured.processor.append(spent.processor)
        if memory:
            measured.memory.extend(everywhere(allocated(job, feed)))
    finally:
        feed.close()
        data.assembler.reader.close()
    job.close()
    gc.collect()


def allocated(job: Job, feed: Feed) -> dict[str, int]:
    """Bytes of live storages at the peak of a step, by kind. The step is the first one, again."""
    names = group_names(job)
    recorder = Recorder(torch.device("cpu"), job.rank.rank, values=None, names=lambda g: names[g.group_name])
    feed_again = open_feed(job, open_data(job, feed.index))
    try:
        with recorder:
            record_step(job, recorder, lambda: feed_again.next(0, 1)[0])
    finally:
        feed_again.close()
    return dict(recorder.trace(job.rank.world, ()).memory.by_kind)


def main() -> None:
    out, config, *layouts = map(Path, sys.argv[1:])
    rank = init_distributed(load_config(config))
    try:
        found = [Measured(str(config), str(x), [], [], []) for x in layouts]
        blueprints = [blueprint_of(config, x, rank.world) for x in layouts]
        for number in range(ROUNDS):
            for blueprint, measured in zip(blueprints, found, strict=True):
                timed(blueprint, rank, measured, memory=number == 0)
                if rank.rank == 0:
                    wall, processor = (median(x) * 1e3 for x in (measured.wall, measured.processor))
                    what = f"{wall:.0f} ms, processor {processor:.0f} ms"
                    print(f"round {number + 1}/{ROUNDS} {measured.layout}: {what}", file=sys.stderr)
        if rank.rank == 0:
            out.write_text(json.dumps([asdict(m) for m in found], indent=1))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
