"""No bound is above the prediction, whatever the data: random candidates of ragged steps, at every branch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm.config.outline import SINK
from mm.config.schema import from_mapping
from mm.predict.costs import priced
from mm.predict.count.job import count_job
from mm.predict.hardware import Hardware, load_hardware
from mm.search.bound import Demand, Placed, bytes_bound, floor_of
from mm.search.candidate import Block, Candidate, Choice, Degrees
from mm.search.limits import space_of
from mm.search.pieces import Pieces
from mm.search.plan import plain_candidate, step_load
from mm.search.predictor import Predictor
from mm.search.space import ANY
from mm.search.tokens import Sink
from mm.search.tree import Node, Tree
from parallel.schedule.action import BACKWARD, FORWARD, Action
from tests.mm.harness import small


def job(world: int, hardware: Hardware, batch: int = 12, **sections: Any) -> tuple[Tree, Predictor]:
    raw = small(data={"train": ["nothing-*.tar"], "context": 256, **sections.pop("data", {})}, **sections)
    raw["train"] |= {"dtype": "bfloat16", "global_batch": batch}
    node = 2 if hardware.links.across is not None else None
    raw["run"] = {**raw.get("run", {}), "node_size": node}
    cfg = from_mapping(raw, Path())
    predictor = Predictor(cfg, world, hardware)
    blueprint = predictor.blueprint(plain_candidate(cfg, world).config(cfg))
    load = step_load(predictor, blueprint)
    assert not load.alike
    return Tree(space_of(blueprint), Pieces(blueprint, load, hardware, node), float("inf")), predictor


def descent(tree: Tree, draw: random.Random) -> list[Node]:
    """The branches from a root to a candidate."""
    path = [draw.choice(list(tree.roots()))]
    while not path[-1].leaf:
        below = [b for b in tree.expand(path[-1]) if b.bound < float("inf")]
        if not below:
            return []
        path.append(draw.choice(below))
    return path


def check(tree: Tree, predictor: Predictor, seeds: range) -> int:
    """Compare candidates with the bounds of all that they are below; how many could be predicted."""
    done, reserved = 0, predictor.hardware.memory.reserved
    for seed in seeds:
        path = descent(tree, random.Random(seed))
        found = predictor.judge(tree.candidate(path[-1])).prediction if path else None
        if found is None:
            continue
        done += 1
        for node in path:
            what = tree.candidate(path[-1]).describe(), node.key
            assert node.bound <= found.step_s, what
            assert node.bytes + reserved <= found.peak_memory_bytes, what
    return done


def test_no_bound_is_above_a_prediction() -> None:
    assert check(*job(4, load_hardware("h100")), range(8)) >= 4


@pytest.mark.parametrize("window", [None, 64])
def test_keys_that_no_query_sees_are_in_no_bound(window: int | None) -> None:
    """Of documents that cross cp, and in windows."""
    llm = {**small()["model"]["llm"], "pattern": "**", "window": window}
    model = {**small()["model"], "llm": llm}
    tree, _ = job(4, load_hardware("cpu-gloo"), batch=2, model=model, data={"context": 16384})
    assert isinstance(tree.asked, Pieces)
    for degrees in (Degrees(), Degrees(cp=2), Degrees(cp=4), Degrees(tp=2, cp=2, sequence_parallel=True)):
        block = Block(0, degrees.model)
        demand = tree.asked.demand(SINK, Choice(block, degrees, ANY), 1, (), "1f1b")
        (floor,) = tree.asked.floors(block, degrees, [ANY], [1], ())[0]
        assert demand is not None
        assert max(tree.asked.least(SINK, block.size, d) for d in (degrees, None)) <= demand.work(0, 1)
        assert 0 < floor.most <= demand.work(0, 1)


def test_what_is_not_trained_has_no_backward_in_a_bound_either() -> None:
    frozen = {m: {**small()["model"][m], "freeze": "all"} for m in ("vision", "audio")}
    frozen["llm"] = {**small()["model"]["llm"], "freeze": True}
    assert check(*job(4, load_hardware("h100"), model=frozen), range(6)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["h100", "a100", "cpu-gloo"])
@pytest.mark.parametrize("pack", [None, 512])
def test_many_bounds_are_not_above_predictions(hardware: str, pack: int | None) -> None:
    data = {} if pack is None else {"pack": pack}
    assert check(*job(8, load_hardware(hardware), data=data), range(100)) >= 40


def test_the_language_model_takes_what_a_prediction_has_it_take() -> None:
    """Of the rank with most work; only rows that enter are left out."""
    tree, predictor = job(4, load_hardware("h100"))
    pieces = tree.asked
    assert isinstance(pieces, Pieces)
    whole = Block(0, 4)
    for degrees, m in ((Degrees(tp=2, sequence_parallel=True), 3), (Degrees(pp=2), 4), (Degrees(cp=2), 2)):
        encoders = tuple((x, Choice(whole, Degrees(), "step")) for x in pieces.blueprint.inputs.encoders)
        candidate = Candidate(4, (*encoders, (SINK, Choice(whole, degrees, "step"))), "1f1b", m)
        made = predictor.blueprint(candidate.config(predictor.cfg))
        plan = predictor.plan(made, candidate)
        costs = priced(made, plan, count_job(made, plan), predictor.hardware).costs
        demand = pieces.demand(SINK, Choice(whole, degrees, ANY), m, (), "1f1b")
        assert demand is not None
        for s in range(degrees.pp):
            for kind, of in ((FORWARD, demand.forward), (BACKWARD, demand.backward)):
                real = sum(costs.seconds(Action(kind, SINK, k, stage=s)) for k in range(m))
                assert 0.97 * real <= of[s] * m * demand.mean <= real * (1 + 1e-9), (degrees, s, kind)


def test_what_more_documents_add_is_about_what_a_whole_large_step_takes_and_no_more() -> None:
    tree, _ = job(4, load_hardware("h100"))
    given = tree.asked.sink
    part, step = (Sink(given.priced, given.load, given.weights, large=1 << n) for n in (16, 30))
    part._tokens = step._tokens = 1 << 19
    for d in (Degrees(), Degrees(ep=2), Degrees(tp=2, sequence_parallel=True)):
        assert 0.95 * step.seconds(d) <= part.seconds(d) <= step.seconds(d)
        one, whole = part.unit(d, ()), step.unit(d, ())
        for low, high in ((one.forward, whole.forward), (one.early, whole.early), (one.late, whole.late)):
            assert 0.9 * high.sum() <= low.sum() <= high.sum() * (1 + 1e-9)


def test_no_dealing_shares_documents_more_evenly_than_the_bound_says() -> None:
    tree, _ = job(4, load_hardware("h100"))
    load = tree.asked.load
    for dp in range(1, 13):
        for m in (1, 2):
            if dp * m <= 12:
                assert 1.0 <= load.share(dp) <= 1 / load.dealt(dp, m).even + 1e-12
    costs = np.sort(load.plan.llm_cost)[::-1]
    mean = costs.sum() / 11
    assert load.share(11) == pytest.approx(max(costs[0], costs[10] + costs[11]) / mean)  # one rank has two
    assert load.share(12) == pytest.approx(costs[0] * 12 / costs.sum())


def test_floors_are_below_what_the_same_documents_ask_as_they_are_dealt() -> None:
    """Of every policy, by each figure: before the step is planned and after."""
    tree, _ = job(4, load_hardware("h100"))
    whole, pieces = Block(0, 4), tree.asked
    for degrees in (Degrees(tp=2, sequence_parallel=True), Degrees(pp=2), Degrees(pp=2, vpp=2)):
        kind = "zero_bubble" if degrees.pp > 1 else "1f1b"
        policies, numbers = ("step", "zero3", "hsdp"), (1, 2, 4)
        found = pieces.floors(whole, degrees, policies, numbers, ())
        for m, row in zip(numbers, found, strict=True):
            for policy, floor in zip(policies, row, strict=True):
                demand = pieces.demand(SINK, Choice(whole, degrees, policy), m, (), kind)
                assert demand is not None
                close = floor_of(demand, m)
                for low, high in zip(floor, close, strict=True):
                    assert low <= high * (1 + 1e-9) and bool(low) == bool(high), (
                        degrees,
                        m,
                        policy,
                        floor,
                        close,
                    )


def test_sums_outlast_the_half_of_a_backward_that_they_are_in() -> None:
    """Of split backwards: what is longer than the gradients of weights, but for the last micro-batch."""
    tree, _ = job(4, load_hardware("h100"))
    pieces = tree.asked
    assert isinstance(pieces, Pieces)
    choice, weights = Choice(Block(0, 4), Degrees(pp=2), "zero3"), pieces.weights
    gather, total, units, twice = weights._moved(SINK, choice)
    assert total > 0
    late = np.array([total / 4, total / 4])
    _, sums, _, _ = weights.traffic(SINK, choice, (late, 3 * late, late), 4, None)
    again = max(gather / units, gather - total / 2 * (1 - 1 / units)) if twice else 0.0
    assert sums.tolist() == pytest.approx([0.75 * (0.75 * total + again)] * 2)


def test_gradients_come_once_activations_go() -> None:
    """Of one micro-batch: no gradient is there yet while most activations are."""
    demand = Demand(1, (1.0,), (1.0,), (1.0,), held=(2.0,), kept=(3.0,), gradients=(4.0,), thin=0.5)
    placed = Placed(demand, Block(0, 1))
    assert bytes_bound(placed, (), (), "1f1b", 1) == pytest.approx(6.0)
    assert bytes_bound(placed, (), (), "1f1b", 2) == pytest.approx(7.5)
