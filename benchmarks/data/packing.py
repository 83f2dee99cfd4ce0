"""How full packed sequences are, how even the work of 64 data-parallel ranks is, and what planning costs.

    python -m benchmarks.data.packing [--dp 64] [--steps 8] [--window 8192]

Made-up samples with long-tailed lengths (lognormal), in three corpora: `text`; `pictures`, captions and
dialogues with 1 to 8 pictures of 64 to 1,024 rows; `mix`, of which half is text, four tenths have pictures
and a tenth has speech of up to 20 minutes. The costs are those of an 8B language model with a 0.4B vision and
a 0.6B speech encoder, everything trained, in forward and backward.

fill: tokens over sequences times their length, all steps. Encoders are colocated with the language model, or
disjoint: each on half as many ranks of its own. by number: the costliest rank over the mean of its
module's ranks, where samples are dealt in order, in equal numbers, with their items. rank: the same as dealt.
wait: the sum over micro-batches of the costliest rank over that of the mean, as if ranks met after each. Of
disjoint modules the worst counts. Means over steps, and the worst step. ms: of planning a step, packing
included, the mean; at most: the slowest, which packs a window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import common
from llm.flops import DocumentCost
from mm.data.sample import Part, Sample, Segment
from mm.order.stream import Stream
from mm.plan.batches import Batches, Windows
from mm.plan.dealing import Seats, by_count, home_ranks
from mm.plan.inputs import EncoderUse, PlanInputs
from mm.plan.items import add_work
from mm.plan.step_plan import StepPlan
from mm.plan.table import SampleTable
from parallel.topology.layout import make_layout

LLM = DocumentCost(token=16e9, square=262e3, supervised=0.0)


class Vision:
    """A 0.4B transformer over 4 patches a row, as the planner sees it."""

    @classmethod
    def rows(cls, cfg: Any, meta: Mapping[str, int]) -> int:
        """Rows of an item."""
        return meta["rows"]

    @classmethod
    def cost(cls, cfg: Any, meta: Mapping[str, int]) -> float:
        """FLOPs of an item."""
        n = 4.0 * meta["rows"]
        return 0.8e9 * n + 124e3 * n**2


class Speech(Vision):
    """A 0.6B encoder of clips of 30 s, a row for each 80 ms."""

    @classmethod
    def cost(cls, cfg: Any, meta: Mapping[str, int]) -> float:
        """FLOPs of an item."""
        return 1.2e9 * meta["rows"] + 98e3 * meta["rows"] ** 2


def corpus(kind: str, n: int, longest: int) -> list[Sample]:
    """n samples of at most `longest` tokens."""
    rng = np.random.default_rng(0)
    return [_sample(j, _kind(kind, rng), longest, rng) for j in range(n)]


def _kind(kind: str, rng: np.random.Generator) -> str:
    return str(rng.choice(["text", "pictures", "speech"], p=[0.5, 0.4, 0.1])) if kind == "mix" else kind


def _sample(j: int, kind: str, longest: int, rng: np.random.Generator) -> Sample:
    left, items = longest - 2, []
    if kind == "pictures":
        items = [("vision", int(r)) for r in rng.integers(64, 1025, int(rng.integers(1, 9)))]
    elif kind == "speech":
        seconds = float(np.clip(rng.lognormal(3.5, 1.2), 1, 1200))
        items = [("audio", 375)] * int(seconds // 30) + [("audio", 1 + int(seconds % 30 * 12.5))]
    words = int(np.clip(rng.lognormal(6.0 if kind == "text" else 4.5, 1.1), 8, left))
    found = []
    left -= min(words, left)
    for k, (module, rows) in enumerate(items):
        if rows <= left:
            part = Part("s", f"{module}{k}", 64 * j + k, 1, "", {"rows": rows})
            found.append(Segment(module, 0, part, False, None))
            left -= rows
    return Sample(
        j, str(j), "s", (*found, Segment("text", words, None, True, None)), Part("s", "json", j, 1, "", {})
    )


def inputs(dp: int, microbatches: int, length: int, *, colocated: bool) -> PlanInputs:
    """The language model on dp ranks; encoders on the same, or each on half as many of its own."""
    world = dp if colocated else 2 * dp
    places = [(0, dp)] * 3 if colocated else [(0, dp), (dp, dp + dp // 2), (dp + dp // 2, 2 * dp)]
    specs = [{"ranks": f"{a}-{b - 1}"} for a, b in places]
    return PlanInputs(
        llm=make_layout("llm", world, specs[0]),
        encoders={
            "vision": EncoderUse(Vision, None, make_layout("vision", world, specs[1])),
            "audio": EncoderUse(Speech, None, make_layout("audio", world, specs[2])),
        },
        context=length,
        microbatches=microbatches,
        llm_cost=LLM,
    )


def work(plan: StepPlan, seats: Seats, *, at_home: bool) -> np.ndarray:
    """FLOPs of each rank in each micro-batch: [microbatches, ranks]. seats: of samples in order of the plan's
    lines. at_home: items are computed beside their sample."""
    made, n = plan.inputs, len(plan.bounds) - 1
    out = np.zeros((n, 1 + max(r for x in made.layouts for r in x.ranks)))
    add_work(plan.llm_cost, seats, made.llm, 3.0, out)
    for m, e in plan.items.items():
        layout = made.encoders[m].layout
        home = home_ranks(*seats, made.llm.dp, layout.dp)[e.sample]
        dealt = home if at_home else e.columns.source_dp
        add_work(e.cost, Seats(seats.microbatch[e.sample], dealt), layout, 3.0, out)
    return out


class Measured(NamedTuple):
    """Of one step."""

    tokens: int
    by_number: float
    rank: float
    wait: float
    ms: float


def steps(table: SampleTable, made: PlanInputs, length: int, count: int, window: int) -> Iterator[Measured]:
    """Steps of one sequence for each dp rank and micro-batch."""
    n, dp = made.microbatches, made.llm.dp
    nobody = np.zeros(0, dtype=np.int64)
    batches = Batches(Stream.whole(1, len(table.ids)), n * dp, Windows(length, window, nobody))
    for step in range(count):
        start = time.perf_counter()
        plan = batches.plan(step, table.take, made)
        ms = (time.perf_counter() - start) * 1e3
        assert plan.filled.max() <= length
        plain = by_count(len(plan.order), n, dp)
        lines = Seats(plain.microbatch[plan.order], plain.dp[plan.order])
        old, new = work(plan, lines, at_home=True), work(plan, plan.seats, at_home=False)
        groups = [sorted(ranks) for ranks in {tuple(sorted(x.ranks)) for x in made.layouts}]
        found = [(uneven(old[:, g]), uneven(new[:, g]), waits(new[:, g])) for g in groups]
        by_number, rank, wait = np.max(found, axis=0).tolist()
        yield Measured(plan.tokens, by_number, rank, wait, ms)


def uneven(load: np.ndarray) -> float:
    """The costliest rank of a step over the mean; 1 where there is no work."""
    total = load.sum(axis=0)
    return float(total.max() / total.mean()) if total.any() else 1.0


def waits(load: np.ndarray) -> float:
    """The same where ranks meet after each micro-batch."""
    return float(load.max(axis=1).sum() / load.mean(axis=1).sum()) if load.any() else 1.0


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--dp", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--samples", type=int, default=60_000)
    args = parser.parse_args()
    print(
        "length  corpus    encoders   micro |  fill | by number      rank (worst)      wait (worst) "
        "| ms, most"
    )
    for length in (8192, 32_768):
        for kind in ("text", "pictures", "mix"):
            samples = corpus(kind, args.samples, length)
            table = SampleTable.of(samples, inputs(args.dp, 1, length, colocated=True))
            for colocated in (True, False) if kind != "text" else (True,):
                for n in args.microbatches:
                    made = inputs(args.dp, n, length, colocated=colocated)
                    found = list(steps(table, made, length, args.steps, args.window))
                    _, old, rank, wait, ms = np.asarray(found).T
                    fill = sum(f.tokens for f in found) / (len(found) * n * args.dp * length)
                    where = "colocated" if colocated else "disjoint"
                    print(
                        f"{length:6}  {kind:8}  {where:9}  {n:5} | {fill:.3f} | {old.mean():9.2f}"
                        f"  {rank.mean():7.3f} ({rank.max():.3f})  {wait.mean():7.3f} ({wait.max():.3f})"
                        f" | {ms.mean():3.0f} {ms.max():7.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
