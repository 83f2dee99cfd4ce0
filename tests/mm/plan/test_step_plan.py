"""The step plan: a pure function that accounts for every sample, item and row."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning import step as step_cost
from benchmarks.planning import synthetic
from llm.counts import Counts
from mm.commands.dry_run import dry_run
from mm.config.data import DataConfig
from mm.config.schema import from_mapping
from mm.config.training import TrainConfig
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.tokenizer import Tokenizer
from mm.plan.blueprint import draw_up
from mm.plan.inputs import PlanInputs
from mm.plan.made_up import made_up
from mm.plan.select import select
from mm.plan.step_plan import Edge, StepPlan, plan_step
from mm.plan.table import SampleTable
from mm.ranks.batch import IGNORE, Assembler
from mm.report.plan_json import first_step, plan_data, plan_json
from mm.train.update import learning_rate
from parallel.boundary import PlanCache, plan_edge
from parallel.topology.axis import Axes, Axis
from parallel.topology.layout import Layout
from tests.mm.harness import CONFIGS, small

INDEX = load_index(["data/digits-train-*.tar"], CONFIGS)


def inputs(world: int, layout: dict[str, dict[str, object]], microbatches: int, deal: str) -> PlanInputs:
    raw = small(layout=layout, schedule={"microbatches": microbatches})
    for m in ("vision", "audio"):
        raw["model"][m]["deal"] = deal
    return replace(draw_up(from_mapping(raw, CONFIGS), world).inputs, mtp_depths=3)


# Some of them cut to fewer tokens than they have.
SAMPLES = (
    *INDEX.samples,
    *select(
        INDEX,
        replace(inputs(1, {}, 1, "cost"), context=40),
        DataConfig(train=["any"], overlong="truncate", max_skipped=1.0),
    ).usable,
)


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
    samples = [rng.choice(SAMPLES) for _ in range(rng.choice([1, 2, 7, 24]))]
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
            homes = zip(mb.dp_of, mb.samples, strict=True)
            read = {(dp, p.sha256): made.rows(module, p) for dp, s in homes for p in s.items(module)}
            assert edge.rows == sum(read.values())
            for side in (edge.source, edge.dest):
                cover = np.zeros(edge.rows, dtype=int)
                for s, n in zip(side.start, side.length, strict=True):
                    cover[s : s + n] += 1
                assert (cover == 1).all() if side is edge.source else (cover >= 1).all()
            assert edge.source.rows.sum() == edge.rows
            assert edge.dest.rows.sum() == sum(made.rows(module, p) for p in items)
        for dp, total in enumerate(mb.tokens):
            used = sum(mb.length[j] for j in mb.samples_of(dp))
            assert total % made.alignment == 0 and max(used, 1) <= total < used + 2 * made.alignment


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
    supervised, routed, mtp = 0, 0, torch.zeros(made.mtp_depths, dtype=torch.int64)
    for rank in range(world):
        cpu = torch.device("cpu")
        axes = {m: axes_at(layout, rank) for m, layout in layouts(made).items()}
        shapes, plans = {Edge(m, 0): (24,) for m in made.encoders}, PlanCache(rank)
        assembler = Assembler(
            inputs=made,
            reader=ShardReader(),
            tokenizer=Tokenizer(),
            rank=rank,
            dtype=torch.float64,
            device=cpu,
            axes=axes,
            sink="llm",
            row_shapes=shapes,
            plans=plans,
        )
        for mb, own in zip(plan.microbatches, assembler.boundary(plan), strict=True):
            bad: list[object] = []
            part = assembler.build(mb, plan.counts, bad, own)  # type: ignore[arg-type]
            assert part is not None and part.llm is not None and not bad
            coord = made.llm.coord(rank)
            if coord.tp == 0:
                supervised += int((part.llm.labels != IGNORE).sum())
                assert part.llm.ahead is not None
                mtp += (part.llm.ahead[1] != IGNORE).sum(1)
                routed += part.llm.n_real
            assert len(part.llm.ids) * made.llm.cp == mb.tokens[coord.dp]
            shards = made.llm.tp if made.llm.sequence_parallel else 1
            first = coord.tp * (len(part.llm.ids) // shards) if shards > 1 else 0
            for module, positions in part.llm.row_positions.items():
                assert (part.llm.ids[positions + first] == Tokenizer().placeholder).all()
                assert len(positions) == part.edges[Edge(module, 0)].forward.rows_out
                assert part.items[module].values.dtype == torch.float64
    assert supervised == plan.supervised
    assert Counts(routed, tuple(mtp.tolist())) == plan.counts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_an_item_that_a_stream_has_several_times_is_computed_once(seed: int) -> None:
    plan, made, _ = random_plan(seed)
    for mb in plan.microbatches:
        for module, edge in mb.edges.items():
            dealt = [edge.items_on(dp) for dp in range(made.encoders[module].layout.dp)]
            own = [(i.llm_dp, i.part.sha256, i.rows) for i in itertools.chain.from_iterable(dealt)]
            assert sorted(own) == sorted({(i.llm_dp, i.part.sha256, i.rows) for i in edge.items})
            assert edge.rows == sum(rows for _, _, rows in own)
            for item in edge.items:
                if item.same_as is not None:
                    first = edge.items[item.same_as]
                    assert first.same_as is None and first.part.sha256 == item.part.sha256
                    assert (first.llm_dp, first.source_dp) == (item.llm_dp, item.source_dp) and item.cost == 0


def test_items_of_unknown_payload_are_all_computed() -> None:
    made = inputs(2, {}, 1, "cost")
    table = SampleTable.of(made_up(made, 4, even=True).samples, made)
    for items in table.items.values():
        assert len(np.unique(items.content)) == len(items.content) > 1


def test_the_digest_sees_a_change() -> None:
    made = inputs(4, {}, 1, "sample")
    first = plan_step(0, INDEX.samples[:8], made)
    assert first.digest != plan_step(1, INDEX.samples[:8], made).digest
    assert first.digest != plan_step(0, INDEX.samples[1:9], made).digest
    other = replace(made, encoders={m: replace(u, deal="cost") for m, u in made.encoders.items()})
    assert first.digest != plan_step(0, INDEX.samples[:8], other).digest


def test_the_learning_rate_warms_up_holds_and_decays() -> None:
    cfg = TrainConfig(steps=100, global_batch=1, lr=1.0, min_lr=0.1, warmup=0.1, decay=0.2)
    rates = [learning_rate(cfg, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and set(rates[9:79]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(rates[79:])) and rates[-1] > 0.1
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
        "sqrt": lambda done: 1 - done**0.5,
    }
    for shape, left in shapes.items():
        falls = cfg.model_copy(update={"decay_shape": shape})
        for step in range(80, 100):
            done = (step - 79) / 21
            assert learning_rate(falls, step) == pytest.approx(0.1 + 0.9 * left(done)), (shape, step)


def test_the_plan_of_1024_ranks_is_written_in_seconds(tmp_path: Path) -> None:
    """All edges, and each distinct program once: not a plan for every rank, which took 17 minutes."""
    layout = {
        "vision": {"tp": 2},
        "audio": {"ranks": "0-511", "cp": 2},
        "llm": {"tp": 4, "cp": 2, "pp": 4, "ep": 8, "sequence_parallel": True},
    }
    train = {"global_batch": 1024}
    raw = small(layout=layout, schedule={"microbatches": 8}, train=train)
    blueprint = draw_up(from_mapping(raw, CONFIGS), 1024)
    begin = time.process_time()
    written = plan_json(blueprint, INDEX)
    text = dry_run(blueprint, tmp_path)
    assert time.process_time() - begin < 20
    data = json.loads(written)
    programs = data["schedule"]["programs"]
    assert sorted(r for p in programs for r in p["ranks"]) == list(range(1024))
    assert len(programs) <= 8 and len(written) < 200_000
    rows = re.findall(r"^(\d+)-(\d+) ", text, re.MULTILINE)  # of ranks on the same pipeline ranks
    assert [(int(a), int(b)) for a, b in rows] == [(k, k + 255) for k in range(0, 1024, 256)]
    assert data["edges"]["vision"]["rows"] > 0 < data["edges"]["audio"]["forward_bytes"]


def test_the_bytes_of_an_edge_are_the_sum_of_what_ranks_plan() -> None:
    layout = {
        "vision": {"ranks": [2, 0], "cp": 2},
        "audio": {"tp": 2},
        "llm": {"tp": 2, "ranks": [3, 1, 2, 0]},
    }
    raw = small(layout=layout, schedule={"microbatches": 2})
    raw["model"]["audio"]["freeze"] = "all"
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    plan, data = first_step(blueprint, INDEX), plan_data(blueprint, INDEX)
    for module in ("vision", "audio"):
        parts = [
            plan_edge(module, mb.edges[module].source, mb.edges[module].dest, rank)
            for mb in plan.microbatches
            for rank in range(4)
        ]
        row = 24 * 8
        back = sum(t.received_rows for p in parts for t in p.backward) if module == "vision" else 0
        assert data.edges[module].forward_bytes == sum(p.forward.received_rows for p in parts) * row > 0
        assert data.edges[module].backward_bytes == back * row


def test_planning_at_1024_ranks_takes_a_fraction_of_a_second() -> None:
    """64 micro-batches, two edges, ragged items; 68 ms on an idle core, and a pass a micro-batch took 3 s."""
    made = synthetic.inputs(1024, step_cost.MICROBATCHES)
    table = step_cost.table_of(made, streams=4)
    order = np.random.default_rng(0).permutation(len(table.ids))
    assert step_cost.ms(lambda: step_cost.whole(table, made, order, 7, None), runs=3) < 400
    assert step_cost.ms(lambda: step_cost.whole(table, made, order, 7, 8), runs=3) < 600
