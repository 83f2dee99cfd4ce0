"""How long training stands still for a checkpoint, and how steps fare beside the writing of one.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.checkpoint.stop

Trains the default job (configs/digits.yaml, or `--config`) and saves after every `--every` steps, into a
folder that is removed. Of all ranks the slowest counts.

step: median of steps during which nothing was written, ms. stop: from the end of a step until its state is
copied, median and most, ms and parts of a step. beside: median of the steps during which a writer was at
work. written: from the stop's end until the checkpoint is published, as the next steps notice. waiting: what
the same save takes where the job waits for it, as the last one of a run does.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

import torch.distributed as dist

from benchmarks import common
from mm.checkpoint.saver import Saver
from mm.config.schema import load_config
from mm.plan.blueprint import draw_up
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import init_distributed
from mm.train.one_step import open_feed, train_step


def slowest(job: Job, seconds: float) -> float:
    """The most of all ranks."""
    return float(job.control.gather([seconds]).max())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--config", type=Path, default=common.ROOT / "configs/digits.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    cfg = load_config(args.config, ["checkpoint.every=1"])
    rank = init_distributed(cfg)
    blueprint = draw_up(cfg, rank.world)
    index = open_index(blueprint, cfg.data.train, cfg.base)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    directory = Path(folder[0])
    with closing(Saver(blueprint, index, directory, rank.rank)) as saver:
        job = build_job(blueprint, rank)
        feed = open_feed(job, open_data(job, index))
        quiet, beside, stops, written = list[float](), list[float](), list[float](), list[float]()
        begun = 0.0
        for step in range(args.steps):
            busy, start = not saver.check(job), time.perf_counter()
            train_step(job, feed, step)
            seconds = slowest(job, time.perf_counter() - start)
            saver.prepare(job)
            done = saver.check(job)
            if busy and done:
                written.append(slowest(job, time.perf_counter() - begun))
            if step > 2:  # the first ones make what later ones use again
                (beside if busy else quiet).append(seconds)
            if (step + 1) % args.every == 0:
                saver.wait(job)
                dist.barrier()
                saver.start(job, step + 1, feed.bad, feed.drawn)
                begun = time.perf_counter()
                stops.append(slowest(job, saver.seconds))
        saver.wait(job)
        start = time.perf_counter()
        saver.start(job, args.steps + 1, feed.bad, feed.drawn)
        saver.wait(job)
        whole = slowest(job, time.perf_counter() - start)
        feed.close()
        if rank.rank == 0:
            step_s = median(quiet)
            print(f"step     {1e3 * step_s:8.1f} ms, median of {len(quiet)}")
            for name, s in (("median", median(stops)), ("most", max(stops))):
                print(f"stop     {1e3 * s:8.1f} ms = {s / step_s:.1%} of a step ({name} of {len(stops)})")
            print(f"beside   {1e3 * median(beside):8.1f} ms, median of {len(beside)}")
            print(f"written  {1e3 * median(written):8.1f} ms, median of {len(written)}")
            print(f"waiting  {1e3 * whole:8.1f} ms")
        job.close()
    if rank.rank == 0:
        shutil.rmtree(directory)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
