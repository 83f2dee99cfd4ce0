"""What planning costs one rank, from 8 to 4,096 ranks: time and peak memory, without any process group.

    python -m benchmarks.boundary.plan [--node-size 8]

About ten items a rank, of 1 to 63 rows: vision tp2 dealt at random to the llm's tp8 cp2, both on all ranks.
`sides`: the row maps from layouts and items. `plan`: one rank's part of the edge, both directions. `again`:
the same from a PlanCache that has it. Times are processor time, the minimum of several runs.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks import common
from parallel.boundary import PlanCache, RowMap, dest_side, plan_edge, source_side
from parallel.topology.layout import make_layout


def sides(world: int, items: int, shard: bool) -> Callable[[], tuple[RowMap, RowMap]]:
    """Makes both sides of a random deal; shard: the llm's sequence parallelism."""
    rng = np.random.default_rng(0)
    vision = make_layout("vision", world, {"tp": 2})
    llm = make_layout(
        "llm", world, {"tp": min(8, world), "cp": 2 if world >= 16 else 1, "sequence_parallel": shard}
    )
    rows = rng.integers(1, 64, items)
    lane = np.arange(items) * llm.dp // items
    total = np.bincount(lane, rows, llm.dp).astype(np.int64)
    position = np.cumsum(rows) - rows - (np.cumsum(total) - total)[lane]
    tokens = -(-total // 32) * 32
    deal = rng.integers(0, vision.dp, items)
    return lambda: (
        source_side(vision, rows, deal),
        dest_side(llm, rows, lane, position, tokens, order="zigzag"),
    )


def seconds(call: Callable[[], object], runs: int = 7) -> float:
    best = float("inf")
    for _ in range(runs):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call has in use at most."""
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--node-size", type=int, help="plan two hops for nodes of so many ranks")
    args = parser.parse_args()
    for shard in (False, True):
        print(f"llm tp8 cp2{' sp' if shard else ''} zigzag, node size {args.node_size}")
        print(f"{'ranks':>6} {'items':>7} | {'sides ms':>9} {'plan ms':>9} {'again ms':>9} | {'peak MiB':>9}")
        for world in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            items = world * 10_000 // 1024
            make = sides(world, items, shard)
            source, dest = make()
            cache = PlanCache(7, node_size=args.node_size)

            def plan(source: RowMap = source, dest: RowMap = dest) -> object:
                fresh = replace(source), replace(dest)  # maps remember what they sorted
                return plan_edge("vision -> llm", *fresh, 7, node_size=args.node_size)

            def again(cache: PlanCache = cache, source: RowMap = source, dest: RowMap = dest) -> object:
                return cache.plan("vision -> llm", source, dest)

            plan(), again()
            times = [seconds(call) * 1e3 for call in (make, plan, again)]
            print(
                f"{world:6} {items:7} | {times[0]:9.2f} {times[1]:9.2f} {times[2]:9.2f} | "
                f"{peak(plan) / 2**20:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
