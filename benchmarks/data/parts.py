"""Processor time that the feed takes for a picture, part by part: each alone, in one process and one thread.

    python -m benchmarks.data.parts [--pictures 512] [--batch 32] [--steps 60]

The pictures and the job are those of benchmarks/data/throughput.py. Medians and least of the steps, which go
through all parts in turn. In a job caches are colder, and processes wake each other: a part costs more.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import loads
from typing import Any, TypeVar

import torch

from benchmarks import common
from benchmarks.data.made import config, feeding, jpegs, write_tars
from encoders import compat
from mm.plan.batches import AHEAD
from mm.plan.table import DataTable
from mm.ranks.decoding import Decoded, Order, Room, Tray, attempt, small, unpacked
from mm.ranks.feed import Feed
from mm.ranks.planner import Planned, bare
from mm.ranks.shared import SharedMemory

T = TypeVar("T")


class Parts:
    """Seconds by part, one a step."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def of(self, part: str, what: Callable[[], T]) -> T:
        """Run something as a part."""
        begin = time.thread_time()
        found = what()
        self.spent.setdefault(part, []).append(time.thread_time() - begin)
        return found


def step_of(feed: Feed, plan: Callable[[], Planned], samples: Any, room: Room, parts: Parts) -> None:
    """One step through planner, rank and worker."""
    assembler = feed._assembler
    made = parts.of("planner: planned", plan)
    data = parts.of("planner: sent", lambda: bytes(ForkingPickler.dumps(bare(made))))
    planned: Planned = parts.of("rank: plan received", lambda: loads(data))
    table = replace(planned.plan.table, samples=samples)
    plan_here = replace(planned.plan, table=table, inputs=assembler.inputs)
    (mb,) = plan_here.microbatches
    reads = parts.of("rank: looked up", lambda: assembler.needs(mb))
    places = parts.of("rank: places", lambda: assembler.places(reads, room.memory.empty))

    def order() -> bytes:
        shared = [None if own is None else room.memory.place(own) for own in places]
        return bytes(ForkingPickler.dumps(Order(1, 0, small(reads.every), shared)))

    sent = parts.of("rank: order", order)
    given: Order = parts.of("worker: order", lambda: loads(sent))
    memory = [None if own is None else room.memory.bytes_at(*own) for own in given.places]
    both = list(zip(given.tasks, memory, strict=True))

    def read(items: bool) -> list[Decoded]:
        return [attempt(assembler.decode, task, at) for task, at in both if bool(task.module) == items]

    found = parts.of("worker: read and decoded", lambda: read(True))
    found += parts.of("worker: texts", lambda: read(False))

    def answer() -> tuple[bytes, int]:
        answers, at = [], 0
        for one, own in zip(found, given.places, strict=True):
            said, end = room.laid(one, 0, at, own)
            answers.append(said)
            at = at if end is None else end
        return json.dumps(answers).encode(), at

    text, used = parts.of("worker: answer", answer)

    def taken() -> list[Decoded]:
        tray, every = room.trays[0].filled(used), zip(json.loads(text), reads.every, places, strict=True)
        return [unpacked(said, tray, task, own) for said, task, own in every]

    results = reads.filled(parts.of("rank: answer", taken))
    parts.of(
        "rank: put together",
        lambda: assembler.build(mb, plan_here.counts, [], planned.boundary[0], results),
    )


def main() -> None:
    args = common.parser(__doc__)
    args.add_argument("--pictures", type=int, default=512)
    args.add_argument("--side", type=int, default=224)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--steps", type=int, default=60)
    asked = args.parse_args()
    compat.repair()
    torch.set_num_threads(1)
    parts = Parts()
    with tempfile.TemporaryDirectory(prefix="parts-") as folder:
        write_tars(Path(folder), list(jpegs(asked.pictures, asked.side)), shards=8)
        with feeding(config(Path(folder), asked.side, asked.batch)) as feed:
            inputs, assembler = feed._assembler.inputs, feed._assembler
            table = DataTable.of(feed.index, inputs)
            batches = replace(feed._options.batches, ahead=AHEAD)
            room = Room(SharedMemory(1 << 30), [Tray.new(1 << 26)])

            def plan(step: int) -> Planned:
                made = batches.plan(step, table.take, inputs, frozenset())
                return Planned(made, assembler.boundary(made))

            for step in range(asked.steps):
                step_of(feed, lambda step=step: plan(step), table.samples, room, parts)  # type: ignore[misc]
    print("| part | ms a picture | least |")
    print("|---|---|---|")
    for part, spent in parts.spent.items():
        middle, least = (1e3 * x / asked.batch for x in (statistics.median(spent), min(spent)))
        print(f"| {part} | {middle:.4f} | {least:.4f} |")


if __name__ == "__main__":
    main()
