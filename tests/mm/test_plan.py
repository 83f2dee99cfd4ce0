"""The step plan: a pure function that accounts for every sample, item and row."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.batch import IGNORE, Assembler
from mm.blueprint import draw_up
from mm.config import TrainConfig, from_mapping
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.tokenizer import Tokenizer
from mm.plan import Edge, PlanInputs, StepPlan, deal_by_cost, plan_step, share
from mm.update import learning_rate
from parallel.axis import Axes, Axis
from parallel.boundary import PlanCache
from parallel.layout import Layout
from tests.mm.harness import CONFIGS, small

INDEX = load_index(["data/digits-train-*.tar"], CONFIGS)


def inputs(world: int, layout: dict[str, dict[str, object]], microbatches: int, deal: str) -> PlanInputs:
    raw = small(layout=layout, schedule={"microbatches": microbatches})
    for m in ("vision", "audio"):
        raw["model"][m]["deal"] = deal
    return draw_up(from_mapping(raw, CONFIGS), world).inputs


def random_plan(seed: int) -> tuple[StepPlan, PlanInputs, int]:
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 4, 6, 12])
    tps = [t for t in (1, 2, 3, 4) if world % t == 0]
    tp = rng.choice([t for t in tps if t != 3])
    llm = {"tp": tp, "sequence_parallel": rng.random() < 0.5}
    llm["cp"] = rng.choice([c for c in (1, 2, 3) if world % (tp * c) == 0])
    layout: dict[str, dict[str, object]] = {}
    for m in ("vision", "audio"):
        layout[m] = {"tp": rng.choice(tps), "sequence_parallel": rng.random() < 0.5}
        layout[m]["cp"] = rng.choice([c for c in (1, 2, 3) if world % (layout[m]["tp"] * c) == 0])
    made = inputs(world, {**layout, "llm": llm}, rng.choice([1, 2, 5]), rng.choice(["sample", "cost"]))
    samples = [rng.choice(INDEX.samples) for _ in range(rng.choice([1, 2, 7, 24]))]
    return plan_step(3, samples, made), made, world


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_every_row_is_held_once_and_enters_at_its_placeholder(seed: int) -> None:
    plan, made, _ = random_plan(seed)
    again, _, _ = random_plan(seed)
    assert plan.digest == again.digest
    for mb in plan.microbatches:
        for module, edge in mb.edges.items():
            items = [p for s in mb.samples for p in s.items(module)]
            assert [i.part for i in edge.items] == items
            assert edge.rows == sum(made.rows(module, p) for p in items)
            for side in (edge.source, edge.dest):
                cover = np.zeros(edge.rows, dtype=int)
                for s, n in zip(side.start, side.length, strict=True):
                    cover[s : s + n] += 1
                assert (cover == 1).all() and side.rows.sum() == edge.rows
        for lane, total in enumerate(mb.tokens):
            used = sum(mb.length[j] for j in mb.lane_samples(lane))
            assert total % made.granule == 0 and max(used, 1) <= total < used + 2 * made.granule


def layouts(made: PlanInputs) -> dict[str, Layout]:
    return {"llm": made.llm, **{m: use.layout for m, use in made.encoders.items()}}


def axes_at(layout: Layout, rank: int) -> Axes:
    """Axes that know places but cannot communicate: all that a plan needs."""
    at, no_group = layout.coord(rank), cast(Any, object())
    tp, cp = (Axis(name, getattr(layout, name), getattr(at, name), no_group) for name in ("tp", "cp"))
    return Axes(tp=tp, cp=cp, sequence_parallel=layout.sequence_parallel and layout.tp > 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_tensors_agree_with_the_plan(seed: int) -> None:
    plan, made, world = random_plan(seed)
    supervised = 0
    for rank in range(world):
        cpu = torch.device("cpu")
        axes = {m: axes_at(layout, rank) for m, layout in layouts(made).items()}
        shapes, plans = {Edge(m, 0): (24,) for m in made.encoders}, PlanCache(rank)
        assembler = Assembler(
            made, ShardReader(), Tokenizer(), rank, torch.float64, cpu, axes, "llm", shapes, plans
        )
        for mb in plan.microbatches:
            bad: list[object] = []
            part = assembler.build(mb, plan.supervised, bad)  # type: ignore[arg-type]
            assert part is not None and part.llm is not None and not bad
            coord = made.llm.coord(rank)
            if coord.tp == 0:
                supervised += int((part.llm.labels != IGNORE).sum())
            assert len(part.llm.ids) * made.llm.cp == mb.tokens[coord.dp]
            shards = made.llm.tp if made.llm.sequence_parallel else 1
            first = coord.tp * (len(part.llm.ids) // shards) if shards > 1 else 0
            for module, places in part.llm.places.items():
                assert (part.llm.ids[places + first] == Tokenizer().placeholder).all()
                assert len(places) == part.edges[Edge(module, 0)].forward.rows_out
                assert part.items[module].values.dtype == torch.float64
    assert supervised == plan.supervised


def test_the_digest_sees_a_change() -> None:
    made = inputs(4, {}, 1, "sample")
    first = plan_step(0, INDEX.samples[:8], made)
    assert first.digest != plan_step(1, INDEX.samples[:8], made).digest
    assert first.digest != plan_step(0, INDEX.samples[1:9], made).digest
    other = replace(made, encoders={m: replace(u, deal="cost") for m, u in made.encoders.items()})
    assert first.digest != plan_step(0, INDEX.samples[:8], other).digest


@given(st.integers(0, 100), st.integers(1, 20))
def test_shares_are_contiguous_whole_and_even(n: int, parts: int) -> None:
    cuts = share(n, parts)
    assert cuts[0][0] == 0 and cuts[-1][1] == n
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert max(b - a for a, b in cuts) - min(b - a for a, b in cuts) <= 1


@given(st.lists(st.floats(1, 100), min_size=1, max_size=40), st.integers(1, 6))
def test_dealing_by_cost_is_within_the_bound_of_longest_first(costs: list[float], lanes: int) -> None:
    dealt = deal_by_cost(costs, [i % lanes for i in range(len(costs))], lanes)
    load = np.bincount(dealt, weights=costs, minlength=lanes)
    floor = max(sum(costs) / lanes, max(costs))
    assert load.max() <= floor * 4 / 3 + 1e-9 * sum(costs) or load.max() <= sum(costs) / lanes + max(costs)
    assert deal_by_cost([1.0] * lanes, list(range(lanes)), lanes) == list(range(lanes))


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    cfg = TrainConfig(steps=100, global_batch=1, lr=1.0, min_lr=0.1, warmup=0.1, decay=0.2)
    rates = [learning_rate(cfg, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and set(rates[9:79]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[79:])) and rates[-1] > 0.1
