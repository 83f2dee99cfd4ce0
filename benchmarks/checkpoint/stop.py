"""How long training stands still for a checkpoint, and how steps fare beside the writing of one.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m benchmarks.checkpoint.stop

Trains the default job (configs/digits.yaml, or `--config`) and saves after every `--every` steps, into a
folder that is removed. Of all ranks the slowest counts.

step: steps during which nothing was written, ms. stop: from the end of a step until its state is copied, and
what of that a core computed. Of both the least, quartiles and most: by as much as steps differ that save
nothing, a stop may too. first: the first stop, which is one of them. beside: median of the steps during
which a writer was at work. written: from the stop's end until the checkpoint is published, as the next steps
notice. waiting: what the same save takes where the job waits for it, as the last one of a run does.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles

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


def spread(seconds: Sequence[float]) -> str:
    """The least, the quartiles and the most, in ms."""
    found = [min(seconds), *quantiles(seconds, n=4), max(seconds)]
    return " ".join(f"{1e3 * s:8.1f}" for s in found)


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
        computed = list[float]()
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
                used = time.thread_time()
                saver.start(job, step + 1, feed.bad, feed.drawn)
                used, begun = time.thread_time() - used, time.perf_counter()
                stops.append(slowest(job, saver.seconds))
                computed.append(slowest(job, used))
        saver.wait(job)
        start = time.perf_counter()
        saver.start(job, args.steps + 1, feed.bad, feed.drawn)
        saver.wait(job)
        whole = slowest(job, time.perf_counter() - start)
        feed.close()
        if rank.rank == 0:
            step_s = median(quiet)
            print("            least      25%   median      75%     most  (ms)")
            print(f"step     {spread(quiet)}, of {len(quiet)}")
            print(f"stop     {spread(stops)}, of {len(stops)}; computing {spread(computed)}")
            print(f"stop     {median(stops) / step_s:.1%} of a step, {max(stops) / step_s:.1%} at most")
            print(f"first    {1e3 * stops[0]:8.1f} ms")
            print(f"beside   {1e3 * median(beside):8.1f} ms, median of {len(beside)}")
            print(f"written  {1e3 * median(written):8.1f} ms, median of {len(written)}")
            print(f"waiting  {1e3 * whole:8.1f} ms")
        job.close()
    if rank.rank == 0:
        shutil.rmtree(directory)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
