"""What planning a step costs one rank, from 8 to 4,096 ranks, without any process group.

    python -m benchmarks.planning.step [--worlds 8 64 1024] [--streams 4] [--node-size 8]

64 micro-batches, two encoders, ragged items and long-tailed texts (benchmarks/planning/synthetic.py).
Processor time of rank 7, milliseconds, the minimum of five runs:

gather: take the batch out of the data set's columns. samples, items: deal them. columns: the rest of what is
equal on all ranks. digest: its fingerprint. maps: both sides of this rank's part of two edges. edges: its
plans of them. all: the sum, in one go. receive: what the rank itself spends on a plan that it is sent.

--streams: samples a packed sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks import common
from benchmarks.planning.synthetic import inputs, samples
from mm.plan.dealing import deal_items, deal_samples
from mm.plan.inputs import PlanInputs
from mm.plan.step_plan import Edge, StepPlan, plan_table
from mm.plan.table import SampleTable
from mm.ranks.batch import RankBoundary
from mm.ranks.job import TWO_HOPS_SPARE
from mm.ranks.planner import Planned, Planner
from parallel.boundary import EdgePlan, Stack, own_maps, plan_stack, stack_positions
from parallel.sequence.dealing import loads

MICROBATCHES = 64
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def table_of(made: PlanInputs, streams: int) -> SampleTable:
    """One step's samples."""
    return SampleTable.of(samples(MICROBATCHES * made.llm.dp * streams), made)


def stacks(plan: StepPlan) -> dict[str, Stack]:
    """Both edges of a plan."""
    made = plan.inputs
    return {
        m: Stack(made.encoders[m].layout, made.llm, 0, e.columns, plan.padded, made.order)
        for m, e in plan.items.items()
    }


def whole(
    table: SampleTable, made: PlanInputs, order: np.ndarray, rank: int, node_size: int | None
) -> tuple[StepPlan, list[RankBoundary]]:
    """All that a rank plans for one step."""
    plan = plan_table(0, table.take(order), made)
    _ = plan.digest, plan.active, plan.supervised
    edges: list[dict[Edge, EdgePlan]] = [{} for _ in range(MICROBATCHES)]
    positions: list[dict[str, np.ndarray]] = [{} for _ in range(MICROBATCHES)]
    for m, stack in stacks(plan).items():
        both = (
            plan_stack(m, stack, rank, node_size=node_size, spares=TWO_HOPS_SPARE),
            stack_positions(stack, rank),
        )
        for k, (edge, tokens) in enumerate(zip(*both, strict=True)):
            edges[k][Edge(m, 0)], positions[k][m] = edge, tokens
    return plan, [RankBoundary(*own) for own in zip(edges, positions, strict=True)]


def ms(call: Callable[[], object], runs: int = 5) -> float:
    """Processor time of a call, milliseconds."""
    best = float("inf")
    for _ in range(runs):
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best * 1e3


def breakdown(table: SampleTable, made: PlanInputs, order: np.ndarray, node_size: int | None) -> list[float]:
    """The columns of the table above, the whole last."""
    batch, n, rank = table.take(order), made.microbatches, 7
    plan = plan_table(0, batch, made)
    cost = made.llm_cost.of(batch.length, batch.supervised)
    of = {m: np.repeat(np.arange(len(i.of)), i.of) for m, i in batch.items.items()}
    others = [loads(i.cost, of[m], len(i.of)) for m, i in batch.items.items()]

    def items() -> None:
        for m, e in plan.items.items():
            deal_items(e.cost, e.columns.batch, e.home, np.zeros((n, made.encoders[m].layout.dp)))

    def digest() -> None:
        plan.__dict__.pop("digest", None)
        _ = plan.digest

    gather = ms(lambda: table.take(order))
    dealt = ms(lambda: deal_samples(cost, batch.length, others, n, made.llm.dp)), ms(items)
    columns = ms(lambda: plan_table(0, batch, made)) - sum(dealt)
    maps = ms(lambda: [own_maps(s, rank, node_size) for s in stacks(plan).values()])
    edges = ms(
        lambda: [
            (plan_stack(m, s, rank, node_size=node_size, spares=TWO_HOPS_SPARE), stack_positions(s, rank))
            for m, s in stacks(plan).items()
        ]
    )
    total = ms(lambda: whole(table, made, order, rank, node_size))
    return [gather, *dealt, columns, ms(digest), maps, edges - maps, total]


def planner(table: SampleTable, made: PlanInputs, order: np.ndarray, node_size: int | None) -> Planner:
    """A process that plans the same step again and again."""

    def plan(step: int, known_bad: frozenset[int]) -> Planned:
        found, edges = whole(table, made, order, 7, node_size)
        return Planned(found, edges)

    return Planner(plan, table, made, 7)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--streams", type=int, default=4, help="samples a packed sequence")
    parser.add_argument("--node-size", type=int, help="plan two hops for nodes of so many ranks")
    args = parser.parse_args()
    names = ("gather", "samples", "items", "columns", "digest", "maps", "edges", "all", "receive")
    print(f"{'ranks':>6} {'samples':>8} {'items':>8} | {' '.join(f'{n:>8}' for n in names)} | llm imbalance")
    for world in args.worlds:
        made = inputs(world, MICROBATCHES)
        table = table_of(made, args.streams)
        order = np.random.default_rng(1).permutation(len(table.ids))
        process = planner(table, made, order, args.node_size)
        times = breakdown(table, made, order, args.node_size)
        times.append(ms(lambda: process.plan(0, frozenset())))  # noqa: B023  # called here
        plan = plan_table(0, table.take(order), made)
        found = [i for i in plan.imbalance(None) if i is not None]
        dealt, other = (np.mean([getattr(i, k) for i in found]) for k in ("dealt", "by_sample"))
        items = sum(len(e.cost) for e in plan.items.values())
        row = " ".join(f"{t:8.1f}" for t in times)
        print(f"{world:6} {len(table.ids):8} {items:8} | {row} | {other:.2f} -> {dealt:.3f}", flush=True)
        process.close()


if __name__ == "__main__":
    main()
