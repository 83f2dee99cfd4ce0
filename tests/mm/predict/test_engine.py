"""Runs of others, predicted: their metric, and closed forms of what they hold, compute and send."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from benchmarks.planning.published import Case
from benchmarks.planning.published_rows import FITTED, TESTED, Degrees, Row, Sizes, joint
from mm.errors import Refused
from mm.predict.engine import as_megatron, megatron
from mm.predict.hardware import load_hardware
from mm.predict.paper import paper_flops
from mm.predict.step import predict
from mm.predict.work import Counts, Work
from parallel.schedule.action import BACKWARD, FORWARD, Kind
from tests.slow import on_demand

RAW = ["3B+70B, encoder tp 4", "3B+32B", "1B+7B, one node (an early run)"]
SMALL = Sizes(length=4096, pictures=2, rows=1024, batch=64, microbatches=4)


@cache
def case(name: str) -> Case:
    return Case.of(next(row for row in (*FITTED, *TESTED) if row.name == name))


def seven(vision: Degrees, llm: Degrees, **more: Any) -> Case:
    """The 7B model on 16 devices."""
    return Case.of(Row("", 16, "1b-7b", joint(SMALL, vision, llm, **more), step_s=1.0))


def counts(found: Case) -> Counts:
    return as_megatron(found.blueprint, found.plan, found.counts, megatron())


@cache
def over_cp() -> Counts:
    """Both modules with tp 2 and cp 2."""
    return counts(seven(Degrees(2, 1, 2), Degrees(2, 1, 2)))


def products(work: Work) -> float:
    return sum(k.flops * k.times for k in work.kernels if k.kind == "product")


def sent(work: Work) -> Mapping[str, float]:
    return {m.op: m.times * m.bytes for m in work.messages}


@pytest.mark.parametrize("name", on_demand(RAW, RAW[:2]))
def test_the_metric_is_the_published_one(name: str) -> None:
    found = case(name)
    row = found.row
    flops = paper_flops(found.blueprint, found.plan)
    assert flops is not None
    assert flops / row.step_s / row.devices / 1e12 == pytest.approx(row.tflops, rel=1e-4)


@pytest.mark.parametrize("tp", on_demand([1, 2, 4], [1, 4]))
def test_a_rank_computes_and_holds_what_closed_forms_say(tp: int) -> None:
    sequence = {"sequence_parallel": "false"}
    plain, split = (counts(seven(Degrees(1), Degrees(tp, 2, more=m))) for m in (sequence, {}))
    width, layers, tokens = 4096, 16, 4096 * 64 / 4 / (16 / tp / 2)
    blocks = 2 * 12 * width**2 * layers * tokens / tp  # FLOPs of a forward of a stage
    for found in (plain, split):
        assert products(found.work["llm", 0, FORWARD]) == blocks
        assert products(found.work["llm", 0, BACKWARD]) == 2 * blocks
        head = 2 * 128000 * width * tokens / tp
        assert products(found.work["llm", 1, FORWARD]) == blocks + head  # of all tokens, with a loss or not
    states = width * tokens
    # Korthikanti et al. (arXiv 2205.05198): 34 s b h / t a layer with sequence parallelism, else 10 + 24 / t.
    assert split.kept["llm", 0] == 34 * states * layers / tp
    assert plain.kept["llm", 0] == (10 + 24 / tp) * states * layers
    if tp == 1:
        assert not split.work["llm", 0, FORWARD].messages
        return
    exposed = megatron().overlap.tp
    whole = 2 * 2 * states * layers  # bytes of two tensors a layer
    forward, backward = split.work["llm", 0, FORWARD], split.work["llm", 0, BACKWARD]
    assert sent(forward) == pytest.approx({"all_gather": exposed * whole, "reduce_scatter": exposed * whole})
    assert sent(backward)["all_gather"] == pytest.approx(2 * exposed * whole)
    assert sent(plain.work["llm", 0, FORWARD]) == {"all_reduce": whole}


def test_states_are_six_bytes_a_parameter_and_twelve_shared() -> None:
    found = over_cp()
    weights = 32 * 12 * 4096**2 + 2 * 128000 * 4096
    held = found.held["llm", 0]  # of the norms too
    own = weights / 2
    assert held.gathered + held.gradients == pytest.approx(6 * own, rel=1e-3)
    assert held.parameters + held.optimizer == pytest.approx(12 * own / 8, rel=1e-3)
    (added,) = found.moved["llm", 0, Kind.GRAD_SYNC]
    assert added.op == "reduce_scatter" and added.bytes == pytest.approx(4 * own, rel=1e-3)


def test_an_encoder_recomputes_and_is_not_split_over_cp() -> None:
    found = over_cp()
    tokens = 2 * 4 * 1024  # pictures of four samples, on each of the ranks of cp
    blocks = 2 * 12 * 1408**2 * 40 * tokens / 2
    projector = 2 * tokens * (1408 * 4096 + 4096**2) / 2
    assert products(found.work["vision", 0, FORWARD]) == blocks + projector
    assert products(found.work["vision", 0, BACKWARD]) == 3 * blocks + 2 * projector


def test_encoders_on_a_pipeline_compute_the_whole_batch_first() -> None:
    found = seven(Degrees(1), Degrees(2, 2))
    assert found.blueprint.schedule(found.plan.active).kind == "three_phase"
    # 128 pictures over 16 ranks are eight for each, two a micro-batch.
    tokens = 2 * 1024
    rows = 2 * 12 * 1408**2 * 40 * tokens + 2 * tokens * (1408 * 4096 + 4096**2)  # blocks and projector
    assert products(counts(found).work["vision", 0, FORWARD]) == rows


@pytest.mark.slow
def test_the_published_winner_of_each_tested_comparison_is_ours() -> None:
    hardware = load_hardware("h100")
    for pair in dict.fromkeys(row.pair for row in TESTED):
        rows = [row for row in TESTED if row.pair == pair]
        found = {r.name: predict(case(r.name).blueprint, case(r.name).plan, hardware) for r in rows}
        by_us = sorted(rows, key=lambda r: found[r.name].step_s)
        assert by_us == sorted(rows, key=lambda r: r.step_s)


def test_models_that_it_is_not_described_for_are_refused() -> None:
    found = seven(Degrees(1), Degrees(2), **{"model.llm.pattern": "'*-M-'"})
    assert paper_flops(found.blueprint, found.plan) is None
    with pytest.raises(Refused, match="nearest: run\\.engine=polyrank"):
        counts(found)
