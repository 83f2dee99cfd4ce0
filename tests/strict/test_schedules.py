"""Schedules carried out by stand-ins under NCCL's rules, each message in the group that its plan names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from parallel.schedule import Action, Costs, Group, Kind, SchedulePlan
from parallel.schedule.executor.standin import run_standins
from tests.parallel.schedule.cases import Case, cases, plan_of, receives_early
from tests.strict.run import Hang
from tests.strict.warm import warm_up

UNIT = 0.0002  # seconds


def carry_out(plans: list[SchedulePlan], warm: bool) -> None:
    """Plans one after the other, each in groups of its own."""
    for k, plan in enumerate(plans):
        try:
            run_standins(plan, Costs(), UNIT, **({"begin": warm_up} if warm else {}))
        except RuntimeError as error:
            raise RuntimeError(f"plan {k}, {plan.kind}") from error


# (kind, ranks, micro-batches, layouts)
Named = tuple[str, int, int, dict[str, Any]]
STEP = {"params": "step"}
PASSES: dict[str, Named] = {
    "1f1b": ("1f1b", 4, 6, {"llm": {"pp": 4}}),
    "colocated": ("auto", 4, 3, {"vision": {}, "llm": {"pp": 2, "tp": 2}}),
    "disjoint": ("auto", 4, 4, {"vision": {"ranks": "0-1", "pp": 2}, "llm": {"ranks": "2-3", "pp": 2}}),
    "mixed": (
        "auto",
        4,
        4,
        {"vision": {"ranks": "1-3"}, "audio": {"ranks": 0}, "llm": {"ranks": "1-3", "pp": 3}},
    ),
    "overlapping": ("auto", 4, 4, {"vision": {"ranks": "0-2"}, "llm": {"ranks": "1-3", "tp": 3}}),
    "vision pp4, llm tp4": ("auto", 4, 4, {"vision": {"pp": 4}, "llm": {"tp": 4}}),
    "three phases": ("three_phase", 4, 6, {"vision": {}, "llm": {"pp": 4}}),
    "gpipe": ("gpipe", 4, 4, {"llm": {"pp": 4}}),
    "zero bubble": ("zero_bubble", 4, 7, {"llm": {"pp": 4}}),
    "filled": ("fill", 4, 6, {"vision": STEP, "llm": {"pp": 4}}),
    "sequential": ("sequential", 4, 3, {"vision": {"ranks": "0-1"}, "llm": {"ranks": "2-3", "pp": 2}}),
}
# Both directions of a pipeline with virtual stages run over one pair of ranks, or over one queue of a group.
VIRTUAL: dict[str, Named] = {
    "interleaved": ("interleaved", 2, 4, {"llm": {"pp": 2, "vpp": 2}}),
    "zero bubble": ("zero_bubble", 2, 4, {"llm": {"pp": 2, "vpp": 2}}),
    "filled": ("fill", 2, 4, {"vision": STEP, "llm": {"pp": 2, "vpp": 2}}),
    "sequential": ("sequential", 2, 4, {"llm": {"pp": 2, "vpp": 3}}),
    "gpipe": ("gpipe", 2, 4, {"llm": {"pp": 2, "vpp": 2}}),
    "interleaved, pp4": ("interleaved", 4, 4, {"llm": {"pp": 4, "vpp": 2}}),
}


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_schedules_of_every_kind_end(eager: bool, strict: Any) -> None:
    strict(4, carry_out, [plan_of(*named) for named in PASSES.values()], True, eager=eager)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_stages(name: str, eager: bool, strict: Any) -> None:
    strict(VIRTUAL[name][1], carry_out, [plan_of(*VIRTUAL[name])], True, eager=eager)


# Interleaved pp=2 vpp=2, two micro-batches, as it was once listed: kind, micro-batch and virtual stage.
OLD_ORDER = (
    "F0.0 F>0.0 >F0.2 F1.0 F>1.0 >F1.2 F0.2 F>0.2 >B0.2 F1.2 F>1.2 >B1.2 B0.2 B>0.2 >B0.0 B1.2! B>1.2 >B1.0 "
    "B0.0 B1.0!",
    ">F0.1 >F1.1 F0.1 F>0.1 >F0.3 F1.1 F>1.1 F0.3 >F1.3 B0.3 B>0.3 F1.3 >B0.1 B1.3! B>1.3 >B1.1 B0.1 B>0.1 "
    "B1.1! B>1.1",
)
KINDS = {
    "F": Kind.FORWARD,
    "F>": Kind.SEND_FORWARD,
    ">F": Kind.RECV_FORWARD,
    "B": Kind.BACKWARD,
    "B>": Kind.SEND_BACKWARD,
    ">B": Kind.RECV_BACKWARD,
}
PEER = {"F>": 1, ">F": -1, "B>": -1, ">B": 1}


def actions(text: str) -> tuple[Action, ...]:
    out = []
    for word in text.split():
        found = re.fullmatch(r"(\D+)(\d)\.(\d)(!?)", word)
        assert found is not None, word
        code, i, stage = found[1], int(found[2]), int(found[3])
        peer = stage + PEER[code] if code in PEER else None
        way = "forward" if "F" in code else "backward"
        groups = (Group("module", "llm", "pp", way),) if peer is not None else ()
        out.append(Action(KINDS[code], "llm", i, stage, bool(found[4]), peer, groups=groups))
    return tuple(out)


def old_plan() -> SchedulePlan:
    plan = plan_of("interleaved", 2, 2, {"llm": {"pp": 2, "vpp": 2}})
    return replace(plan, programs=tuple(actions(text) for text in OLD_ORDER))


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_virtual_stages_in_the_old_order_are_caught(eager: bool, strict: Any, ranks: Any) -> None:
    with pytest.raises(Hang) as caught:
        strict(2, carry_out, [old_plan()], True, eager=eager)
    assert re.search(r"send to 1 .*behind recv from 1 .* for rank 1 \(at recv from 0", str(caught.value))
    assert re.search(r"rank 1 waits .* for rank 0 \(at recv from 1", str(caught.value))


def test_gloo_does_not_notice(ranks: Any) -> None:
    ranks(2, carry_out, [old_plan()], False)


def test_groups_that_no_one_has_used_before_are_caught(strict: Any) -> None:
    """In the order that plans once had; they end in groups in use."""
    old = receives_early(plan_of(*PASSES["vision pp4, llm tp4"]))
    with pytest.raises(Hang, match=r"ring: .*\n  rank \d waits in the host at .*to its first use"):
        strict(4, carry_out, [old], False)
    strict(4, carry_out, [old], True)


@given(st.lists(cases(world=4), min_size=5, max_size=5), st.booleans())
@settings(
    max_examples=3,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_random_schedules_of_random_layouts_end(strict: Any, some: list[Case], eager: bool) -> None:
    strict(4, carry_out, [case.plan() for case in some], True, eager=eager)
