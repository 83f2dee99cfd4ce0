"""What a comparison says in words, on steps whose answer is known because they were made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mm.compare.bound import bound_of
from mm.compare.chain import chain_of
from mm.compare.result import Comparison, Interval, RunResult, Stopped
from mm.compare.verdict import judge, rounds_needed
from parallel.schedule import Costs, Kind, ModuleUse, ScheduleOptions, SchedulePlan, make_schedule
from parallel.topology.layout import make_layout
from tests.mm.compare.made_up import made_run

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "colocated": {"vision": {}, "llm": {"tp": 2}},
    "disjoint": {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "tp": 2}},
    "pipeline": {"vision": {}, "llm": {"pp": 4}},
    "mixed": {"vision": {"ranks": "0-1"}, "llm": {"ranks": "0-3", "pp": 2}},
    "encoder pipeline": {"vision": {"ranks": "0-1", "pp": 2}, "llm": {"ranks": "2-3", "pp": 2}},
}


def plan_of(
    layout: dict[str, dict[str, Any]], n: int = 1, world: int = 4, kind: str = "auto"
) -> SchedulePlan:
    modules = {m: ModuleUse(make_layout(m, world, spec), params="step") for m, spec in layout.items()}
    return make_schedule(kind, modules, sink="llm", active=[{"vision"}] * n, options=ScheduleOptions())


def costs_of(vision: float, llm: float, **more: Any) -> Costs:
    compute = {
        (m, kind): seconds * (1 + (kind is Kind.BACKWARD))
        for m, seconds in (("vision", vision), ("llm", llm))
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    }
    return Costs(compute, **more)


def comparison(*runs: RunResult, **host: str | float) -> Comparison:
    return Comparison(list(runs), rounds=len(runs[0].rounds), host={"device": "cpu", "cores": 4, **host})


times = st.floats(0.05, 4.0)


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    n=st.integers(1, 5),
    vision=times,
    llm=times,
    loads=st.lists(st.floats(0.2, 3.0), min_size=10, max_size=10),
    change=st.floats(-0.5, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_a_module_costs_a_step_what_the_chain_says(
    layout: str, n: int, vision: float, llm: float, loads: list[float], change: float
) -> None:
    """The chain adds up to the step, and is a path of it: were a module slower by a share, the step would be
    longer by at least that share of the module's part; were it faster, no more could be gained. The simulator
    knows nothing of chains and says how long the step then is. With it a transfer also waits for a receiver
    that is late; records do not show that, so a chain with such a pause proves nothing here."""
    plan = plan_of(LAYOUTS[layout], n)
    load = {(m, i): loads[2 * i + (m == "llm")] for m in ("vision", "llm") for i in range(n)}
    now = made_run("now", plan, costs_of(vision, llm, load=load))
    chain, assured = chain_of(now), now.timeline
    assert assured is not None
    assert sum(chain.values()) == pytest.approx(assured.seconds, rel=1e-9)
    assume(not any(part.what == "messages" for part in chain))
    for m, factors in (("vision", (1 + change, 1.0)), ("llm", (1.0, 1 + change))):
        other = made_run("other", plan, costs_of(vision * factors[0], llm * factors[1], load=load)).timeline
        assert other is not None
        part = sum(s for part, s in chain.items() if part.what == "computing" and part.module == m)
        assert other.seconds >= assured.seconds + change * part - 1e-9


@pytest.mark.parametrize(
    ("layout", "n", "costs", "shares", "expected"),
    [
        ("colocated", 1, costs_of(3, 1), {}, ("computing", "vision")),
        ("colocated", 1, costs_of(1, 3), {}, ("computing", "llm")),
        ("colocated", 1, costs_of(3, 1), {"vision": 0.2}, ("exchanging", "vision")),
        ("disjoint", 1, costs_of(3, 1), {}, ("uneven", "vision")),
        ("disjoint", 8, costs_of(1, 3), {}, ("uneven", "llm")),
        ("pipeline", 1, costs_of(0.1, 3), {}, ("pipeline", "llm")),
        ("pipeline", 64, costs_of(0.1, 3), {}, ("computing", "llm")),
        (
            "pipeline",
            1,
            costs_of(0.1, 0.2, transfer={("llm", Kind.SEND_FORWARD): 3.0, ("llm", Kind.SEND_BACKWARD): 3.0}),
            {},
            ("messages", ""),
        ),
    ],
)
def test_what_bounds_a_layout(
    layout: str, n: int, costs: Costs, shares: dict[str, float], expected: tuple[str, str]
) -> None:
    run = made_run("it", plan_of(LAYOUTS[layout], n), costs, shares=shares)
    bound = bound_of(run, 4)
    assert bound is not None and (bound.limit, bound.module) == expected, bound
    assert not expected[1] or expected[1] in bound.text
    if layout == "disjoint":
        rank = {"vision": 0, "llm": 2}[expected[1]]
        away = {"vision": "ranks 2, 3 do not have it", "llm": "ranks 0, 1 do not have it"}[expected[1]]
        assert bound.rank in (rank, rank + 1) and away in bound.text


def test_the_update_and_the_cores_that_ranks_share_are_named() -> None:
    run = made_run("it", plan_of(LAYOUTS["colocated"]), costs_of(0.1, 0.1), update_s=2.0)
    bound = bound_of(run, None)
    assert bound is not None and bound.limit == "updating" and "gradient sums" in bound.text
    slow = {"shares": {"vision": 0.3, "llm": 0.3}, "queued": 0.6}
    bound = bound_of(made_run("it", plan_of(LAYOUTS["colocated"]), costs_of(3, 1), **slow), 2)
    assert bound is not None and bound.limit == "cores" and "4 ranks on 2 cores" in bound.text


def test_an_early_end_is_said_first() -> None:
    one = made_run("one", plan_of(LAYOUTS["colocated"]), costs_of(1, 1))
    end = Stopped("wide", "w.yaml", 2, 3, "MemoryError: no more")
    found = judge(replace(comparison(one), stopped=end)).verdict
    assert found is not None and found.sentences[0] == (
        "The comparison failed in round 2 under the layout wide (w.yaml), on rank 3: MemoryError: no more."
    )
    assert found.sentences[1].endswith("; the baseline is one.")
    assert found.fastest == ["one"]


def test_the_fastest_is_named_with_how_much_and_whether_noise_could_be_it() -> None:
    plan = plan_of(LAYOUTS["colocated"])
    slow = made_run("slow", plan, costs_of(2, 2))
    fast = made_run("fast", plan, costs_of(1, 1))
    found = judge(comparison(slow, fast)).verdict
    assert found is not None and found.fastest == ["fast"]
    assert found.sentences[0].startswith(
        "fast is the fastest, 6 s a step; the next, slow, takes 2.00 times (95 %: "
    )
    assert "above noise" in found.sentences[0]
    near = made_run("near", plan, costs_of(1, 1), rounds=[[5.9], [6.3], [6.0]])
    found = judge(comparison(slow, fast, near)).verdict
    assert found is not None and set(found.fastest) == {"fast", "near"}
    assert "cannot tell it from" in found.sentences[0] and "slow is slower" in found.sentences[0]
    assert any("--rounds" in text for text in found.next_steps)
    few = made_run("few", plan, costs_of(1, 1), rounds=[[5.0]])
    one = made_run("one", plan, costs_of(1, 1), rounds=[[9.0]])
    found = judge(comparison(one, few)).verdict
    assert found is not None and "too few" in found.sentences[0] and set(found.fastest) == {"few", "one"}
    for more, said in ((2, False), (3, True)):  # of many layouts some seem slower by chance
        many = [made_run(f"slow{i}", plan, costs_of(2, 2)) for i in range(more)]
        found = judge(comparison(fast, near, *many)).verdict
        assert found is not None and any("1 time in 20" in text for text in found.sentences) == said


def test_the_order_of_layouts_does_not_change_what_is_said() -> None:
    plan = plan_of(LAYOUTS["colocated"])
    runs = [made_run(name, plan, costs_of(x, 1)) for name, x in (("a", 3), ("b", 2), ("c", 1))]
    said = [judge(comparison(*order)).verdict for order in (runs, runs[::-1])]
    for one in said:
        assert one is not None and one.fastest == ["c"] and one.sentences[0].startswith("c is the fastest")
    a, b = (sorted(t for t in one.sentences if "baseline" not in t) for one in said if one is not None)
    assert a == b


def test_each_module_as_it_is_best_is_proposed_where_no_layout_has_both() -> None:
    """What heterogeneity is for: tp is good for one module and bad for the other."""
    plans = {
        name: plan_of({"vision": {"tp": tp}, "llm": {"tp": tp}}) for name, tp in (("dp4", 1), ("tp4", 4))
    }
    dp4 = made_run("dp4", plans["dp4"], costs_of(1, 4))
    tp4 = made_run("tp4", plans["tp4"], costs_of(3, 1))
    found = judge(comparison(dp4, tp4)).verdict
    assert found is not None
    assert "vision as in dp4 (dp 4)" in found.next_steps[0] and "llm as in tp4 (tp 4)" in found.next_steps[0]
    both = made_run("both", plan_of({"vision": {}, "llm": {"tp": 4}}), costs_of(1, 1))
    found = judge(comparison(dp4, tp4, both)).verdict
    assert found is not None and found.fastest == ["both"]
    assert not any("none of those measured" in text for text in found.next_steps)
    late = made_run("late", plan_of({"vision": {}, "llm": {"tp": 4}}), costs_of(1, 1), update_s=50.0)
    found = judge(comparison(dp4, tp4, late)).verdict  # it has both, and is slow for another reason
    assert found is not None and found.fastest == ["tp4"]
    assert not any("none of those measured" in text for text in found.next_steps)


def test_flops_that_mislead_are_said_to() -> None:
    plan = plan_of(LAYOUTS["colocated"])
    run = made_run("it", plan, costs_of(3, 1), flops_by_module={"vision": 1e9, "llm": 9e9})
    found = judge(comparison(run)).verdict
    assert found is not None
    assert any("vision has 10% of the FLOPs and takes 75% of the time" in t for t in found.sentences)
    even = replace(run, flops_by_module={"vision": 7e9, "llm": 3e9})
    found = judge(comparison(even)).verdict
    assert found is not None and not any("FLOPs" in t for t in found.sentences)


def test_a_busy_machine_and_other_losses_are_said() -> None:
    plan = plan_of(LAYOUTS["colocated"])
    run = made_run("it", plan, costs_of(3, 1))
    found = judge(comparison(run, load=7.5)).verdict
    assert found is not None and any("busy with other work" in t for t in found.sentences)
    found = judge(comparison(run, replace(run, name="odd", max_rel_loss_diff=0.5), load=0.1)).verdict
    assert found is not None and not any("busy" in t for t in found.sentences)
    assert any("losses of odd differ" in t for t in found.sentences)


@pytest.mark.parametrize(
    ("interval", "rounds", "expected"),
    [
        (None, 3, None),
        (Interval(1.1, 1.2), 3, None),  # told apart already
        (Interval(0.5, 2.0), 3, None),  # no difference to be seen
        (Interval(0.9, 1.3), 3, 17),
    ],
)
def test_how_many_rounds_would_tell(interval: Interval | None, rounds: int, expected: int | None) -> None:
    assert rounds_needed(interval, rounds) == expected
