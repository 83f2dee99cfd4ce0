"""The simulator against closed forms, and the laws of its timelines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings

from parallel.schedule import Costs, Kind, check, make_schedule, simulate
from parallel.schedule.action import COMPUTE
from tests.parallel.schedule.cases import Case, cases, plan_of

PIPES = [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 24)]


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("p", "m"), PIPES)
def test_bubble_of_gpipe_and_1f1b(kind: str, p: int, m: int) -> None:
    """(p - 1) / (m + p - 1) of the step: arXiv 1811.06965, section 2.3; arXiv 2104.04473, section 2.2.1."""
    line = simulate(plan_of(kind, p, m, {"llm": {"pp": p}}))
    assert [line.bubble(r) for r in range(p)] == pytest.approx([(p - 1) / (m + p - 1)] * p)


@pytest.mark.parametrize(("p", "m"), PIPES)
@pytest.mark.parametrize("v", [2, 3])
def test_bubble_of_interleaved_1f1b(p: int, m: int, v: int) -> None:
    """(p - 1) / v of a stage's time per micro-batch: arXiv 2104.04473, section 2.2.2."""
    line = simulate(plan_of("interleaved", p, m, {"llm": {"pp": p, "vpp": v}}))
    assert line.mean_bubble == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in PIPES if m >= 2 * p - 1])
def test_bubble_of_zero_bubble(p: int, m: int) -> None:
    """(p - 1) (F + B - W) for ZB-H1: arXiv 2401.10241, table 2."""
    costs = Costs(
        {("llm", Kind.FORWARD): 1.0, ("llm", Kind.BACKWARD_INPUT): 1.25, ("llm", Kind.BACKWARD_WEIGHT): 0.75}
    )
    line = simulate(plan_of("zero_bubble", p, m, {"llm": {"pp": p}}), costs)
    assert line.seconds - 3 * m == pytest.approx((p - 1) * (1 + 1.25 - 0.75))


def test_transfers_are_paid_where_nothing_hides_them() -> None:
    costs = Costs(transfer={("llm", Kind.SEND_FORWARD): 0.5, ("llm", Kind.SEND_BACKWARD): 0.25})
    assert simulate(plan_of("sequential", 3, 2, {"llm": {"pp": 3}}), costs).seconds == 2 * (9 + 2 * 0.75)
    encoder = Costs(transfer={("vision", Kind.BOUNDARY_FORWARD): 2.0})
    plan = plan_of("1f1b", 2, 1, {"vision": {"ranks": 0}, "llm": {"ranks": 1}})
    assert simulate(plan, encoder).seconds == 6 + 2
    assert [(t.start, t.end) for t in simulate(plan, encoder).transfers] == [(1, 3), (6, 6)]


def test_disjoint_encoder_stages_are_stages_of_one_pipeline() -> None:
    """With equal costs a pipeline of encoder and language model stages is 1F1B of all of them."""
    for enc, llm, m in [(1, 1, 4), (2, 2, 8), (1, 3, 6), (3, 2, 7)]:
        world = enc + llm
        layouts = {
            "vision": {"ranks": f"0-{enc - 1}", "pp": enc},
            "llm": {"ranks": f"{enc}-{world - 1}", "pp": llm},
        }
        line = simulate(plan_of("auto", world, m, layouts))
        assert line.seconds == 3 * (m + world - 1)


def test_two_encoders_side_by_side_are_at_one_depth() -> None:
    layouts = {"vision": {"ranks": 0}, "audio": {"ranks": 1}, "llm": {"ranks": "2-3", "pp": 2}}
    assert simulate(plan_of("auto", 4, 8, layouts)).seconds == 3 * (8 + 3 - 1)


def test_shared_cores_slow_ranks_that_compute_at_once() -> None:
    plan = plan_of("1f1b", 4, 4, {"llm": {}})  # four ranks that all compute all the time
    assert simulate(plan, Costs(cores=4)).seconds == 12
    assert simulate(plan, Costs(cores=2)).seconds == pytest.approx(24)
    chain = plan_of("sequential", 2, 2, {"llm": {"pp": 2}})  # one rank at a time needs one core
    assert simulate(chain, Costs(cores=1)).seconds == simulate(chain).seconds
    pipe = plan_of("gpipe", 2, 8, {"llm": {"pp": 2}})
    assert simulate(pipe, Costs(cores=1)).seconds == pytest.approx(2 * 8 * 3)  # never idle: the work itself


def test_ranks_that_idle_leave_their_cores_to_others() -> None:
    plan = plan_of("1f1b", 4, 4, {"llm": {}})
    for share, seconds in ((1.0, 24), (0.75, 18), (0.5, 12), (0.25, 12)):
        assert simulate(plan, Costs(cores=2, share={"llm": share})).seconds == pytest.approx(seconds)


def test_ragged_micro_batches_and_missing_modalities_cost_what_they_hold() -> None:
    plan = plan_of("auto", 1, 2, {"vision": {}, "llm": {}})
    assert simulate(plan, Costs(load={("vision", 0): 0.5, ("llm", 1): 2.0})).seconds == 1.5 + 3 + 3 + 6
    text = make_schedule("auto", plan.modules, sink="llm", active=[(), {"vision"}])
    assert simulate(text).seconds == 3 + 6


@settings(max_examples=60)
@given(cases(train=True))
def test_timelines_keep_order_and_the_critical_path_explains_the_step(case: Case) -> None:
    plan = case.plan()
    costs = Costs(
        {("llm", Kind.FORWARD): 1.5, ("vision", Kind.BACKWARD): 0.75, ("audio", Kind.FORWARD): 0.25}
    )
    line = simulate(plan, costs)
    for p, program in enumerate(plan.programs):
        for a, b in itertools.pairwise(range(len(program))):
            begins = line.start[p][a] if program[a].paired else line.end[p][a]
            assert line.start[p][b] >= begins - 1e-9 or program[b].kind not in COMPUTE
    took = {
        (plan.ranks_of[p][0], a): line.end[p][k] - line.start[p][k]
        for p, program in enumerate(plan.programs)
        for k, a in enumerate(program)
    }
    assert sum(took[place] for place in line.critical_path) == pytest.approx(line.seconds)
    assert 0 <= line.mean_bubble < 1


def test_gathers_and_sums_are_paid_where_nothing_hides_them() -> None:
    """Weights whole for the step: the gather of the first module is exposed, that of the second beside it."""
    specs = {"vision": {"params": "step"}, "llm": {"params": "step"}}
    moved = {("llm", Kind.GATHER): 0.5, ("vision", Kind.GATHER): 0.25, ("llm", Kind.GRAD_SYNC): 1.5}
    plan = plan_of("sequential", 2, 1, specs, costs=Costs(transfer=moved))
    check(plan)
    free = simulate(plan).seconds  # vision's forward, the language model's, both backwards
    assert free == 6 and simulate(plan, Costs(transfer=moved)).seconds == 6.25
    # The sums of the language model run beside the encoder's backward; the encoder's own end after the step's
    # last computation, by one unit at least.
    sums = {("vision", Kind.GRAD_SYNC): 1.0}
    assert simulate(plan, Costs(transfer=sums)).seconds == 7
    assert simulate(plan, Costs(transfer=sums, units={"vision": 4})).seconds == 6.25
    assert (
        simulate(plan, Costs(transfer={("vision", Kind.GRAD_SYNC): 4.0}, units={"vision": 4})).seconds == 8.5
    )
    kinds = [(t.kind, t.module, t.start, t.end) for t in simulate(plan, Costs(transfer=moved)).transfers]
    assert (Kind.GATHER, "llm", 0.0, 0.5) in kinds and (Kind.GRAD_SYNC, "llm", 4.25, 5.75) in kinds


def test_gathers_in_each_computation_expose_their_first_unit() -> None:
    plan = plan_of("1f1b", 2, 3, {"llm": {"sums": "backward"}})
    costs = Costs(transfer={("llm", Kind.GATHER): 0.8}, units={"llm": 4})
    assert simulate(plan, costs).seconds == pytest.approx(9 + 6 * 0.2)
    slow = Costs(transfer={("llm", Kind.GATHER): 2.0}, units={"llm": 4})
    assert simulate(plan, slow).seconds == pytest.approx(9 + 3 * (2 - 0.75) + 3 * (2 - 1.5))
    # One unit stays whole from a forward to its backward.
    assert simulate(plan, Costs(transfer={("llm", Kind.GATHER): 0.8})).seconds == pytest.approx(9 + 3 * 0.8)
    sums = Costs(transfer={("llm", Kind.GRAD_SYNC): 2.5}, units={"llm": 5})
    assert simulate(plan, sums).seconds == pytest.approx(9 + 2 * 0.5 + (2.5 - 2 * 0.8))
    # Sums over replicas come with the last backward alone.
    once = replace(sums, sums={"llm": 2.1})
    assert simulate(plan, once).seconds == pytest.approx(9 + 2 * 0.1 + (2.5 - 2 * 0.8))


@pytest.mark.parametrize("cores", [None, 64.0])
def test_the_optimizer_waits_for_sums(cores: float | None) -> None:
    moved = Costs(transfer={("llm", Kind.GRAD_SYNC): 0.5, ("vision", Kind.GRAD_SYNC): 2.0}, cores=cores)
    specs = {"vision": {"params": "step"}, "llm": {"pp": 2, "params": "step"}}
    for kind in ("fill", "1f1b"):
        plan = plan_of(kind, 4, 4, specs, optimizer=True)
        line = simulate(plan, moved)
        check(plan)
        assert line.seconds > simulate(plan).seconds
        for program, starts in zip(plan.programs, line.start, strict=True):
            assert program[-1].kind is Kind.OPTIMIZER
            assert starts[-1] == max(t.end for t in line.transfers if t.kind is Kind.GRAD_SYNC)
