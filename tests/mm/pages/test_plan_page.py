"""The report of a plan: predictions are shown as they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mm.pages.frontier import Point, unbeaten
from mm.pages.html import clean
from mm.pages.plan_page import Planned, PlanReport, plan_page
from mm.predict.step import Prediction
from mm.search.rejected import Rejected
from parallel.schedule import simulate
from tests.mm.pages.strict_parser import Checked
from tests.mm.pages.test_run_page import EVIL
from tests.parallel.schedule.cases import plan_of

PLACED = {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}}


def planned(name: str, k: int) -> Planned:
    line = simulate(plan_of("auto", 4, 4, PLACED))
    parts = {("vision", "compute"): 0.2, ("llm", "compute"): 0.3, ("", "bubble"): 0.5 * k}
    prediction = Prediction(
        step_s=sum(parts.values()),
        tokens_per_s_per_device=1000 / k,
        tflops_per_device=400.0,
        paper_tflops_per_device=500.0,
        memory={0: {"weights": 2.0**34, "activations": 2.0**33}, 2: {"weights": 2.0**32 / k}},
        bubble_fraction=0.25,
        boundary_s=0.01,
        breakdown=parts,
        timeline=line,
    )
    return Planned(f"{name} {k}", "homogeneous", prediction, f"layout: {name}")


def report(name: str) -> PlanReport:
    rejected = [Rejected(f"tp 8 of {name}", "needs 96 GiB, there are 80", 1_234_567)]
    found = [planned(name, k) for k in (1, 2)]
    return PlanReport(
        found, rejected, [f"{name} is best."], "h100", 4, f"python -m mm plan {name}", f"{name}.yaml"
    )


def test_the_page_has_what_was_predicted() -> None:
    text = " ".join(Checked(plan_page(report("mixed"))).said)
    for found in (
        *(
            "mixed is best.",
            "mixed 2",
            "1 s",
            "1.5 s",
            "24 GiB",
            "500",
            "2-3",
            "25.0 %",
            "10 ms",
            "1,234,567",
        ),
        *("needs 96 GiB, there are 80", "layout: mixed", "python -m mm plan mixed", "bubble", "33.3 %"),
    ):
        assert found in text, found


def test_nothing_in_a_plan_acts_and_an_empty_one_has_a_page() -> None:
    page = Checked(plan_page(report(EVIL)))
    assert page.tags.count("script") == 1 and clean(EVIL) in "".join(page.said)
    Checked(plan_page(PlanReport([], [], [], "h100", 4, "", "")))


points = st.builds(Point, st.just("a"), st.integers(1, 9).map(float), st.integers(1, 9).map(float))


@given(st.lists(points, max_size=12))
def test_the_frontier_is_what_nothing_beats(found: list[Point]) -> None:
    edge = set(unbeaten(found))
    for p in found:
        beaten = any(q.step_s <= p.step_s and q.bytes <= p.bytes and q != p for q in found)
        assert (p in edge) != beaten
