"""What is said of a plan: what is proved, how near, and what is beside the searched space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm.config.schema import from_mapping
from mm.search.candidate import Candidate
from mm.search.plan import Plan, Proof
from mm.search.predictor import Judged
from mm.search.written import as_json, proof_line, proof_lines, sentences, summary
from tests.mm.harness import small
from tests.mm.search.test_polish import SPACE, candidate, judge


def took(seconds: float, of: Candidate | None = None) -> Judged:
    return judge(lambda c: (seconds, 1.0), of or candidate())


def plan(best: Sequence[Judged], proof: Proof, searched: Mapping[str, Sequence[Judged]], **more: Any) -> Plan:
    return Plan(
        best=tuple(best),
        of={"best": best[0] if best else None, "homogeneous": best[-1] if best else None},
        searched=searched,
        proofs={"best": proof, "homogeneous": proof},
        missing={},
        space=SPACE,
        known={},
        considered=9,
        predicted=3,
        polished=4,
        rejected=(),
        seconds=1.0,
        note="made up",
        **{"within": 0.0, "nearest": 0.9, **more},
    )


@pytest.mark.parametrize(
    ("proof", "within", "said"),
    [
        (Proof(True, math.inf), 0.0, "proved; what was left out takes nothing."),
        (Proof(True, 2.5), 0.0, "proved; what was left out takes at least 2.5 s."),
        (Proof(False, 2.0), 0.0, "proved; nothing left out is faster."),
        (Proof(False, 1.6), 0.0, "not proved in time; nothing left out is faster by more than 25.0%."),
        (Proof(False, 1.6), 0.2, "not proved in time; nothing left out is faster by more than 25.0%."),
        (
            Proof(False, 1.6),
            0.3,
            "proved as far as asked for (--within 0.3); nothing left out is faster by more than 25.0%.",
        ),
        (Proof(False, 0.5), 0.0, "not proved in time; nothing left out is faster by more than 4 times."),
    ],
)
def test_what_is_proved_is_said(proof: Proof, within: float, said: str) -> None:
    found = took(2.0)
    one = plan([found], proof, {"best": (found,), "homogeneous": (found,)}, within=within)
    assert proof_line(one, "best") == f"best: {said}"
    (line,) = proof_lines(one)  # one sentence of all of which it is true
    if said.startswith("not proved"):
        most = said.partition("by more than ")[2].rstrip(".")
        said = "Not proved in time; what was left out can be faster than these at most by: "
        assert line == f"{said}best {most}, homogeneous {most}."
    else:
        assert line == f"best, homogeneous: {said}"
    raw = small()
    del raw["model"]["audio"]
    shown = as_json(one, from_mapping(raw, Path()))
    gap = max(0.0, 2.0 / proof.least - 1)
    assert shown["within"] == within and shown["gaps"] == {"best": gap, "homogeneous": gap}
    unknown = replace(one, proofs={"best": Proof(False, 0.0)})
    assert proof_lines(unknown) == ["best: not proved in time; nothing is known of what was left out."]
    wrong = replace(one, nearest=1.2)
    assert "not proved, a bound was 1.200" in proof_line(wrong, "best") and not wrong.proved


def test_what_gave_way_counts_as_left_out() -> None:
    """A proof of the space stays true of what is shown: what polishing has replaced is among the rest."""
    gone, kept, new = took(2.0, candidate(tp=2)), took(2.2), took(1.9, candidate(policy="zero2"))
    assert Proof(True, 2.6).without([gone, kept], [new, kept]) == Proof(True, 2.0)
    assert Proof(True, 2.6).without([gone, kept], [gone, kept]) == Proof(True, 2.6)
    assert Proof(False, math.inf).gap([]) is None and Proof(False, 1.6).gap([took(1.0), kept]) > 0.37  # type: ignore[operator]


def test_choices_beside_the_space_are_named_with_what_they_give() -> None:
    found, new = took(2.0), took(1.6, candidate(policy="replicate"))
    one = plan([new, found], Proof(False, 1.6), {"best": (found,), "homogeneous": (found,)})
    said = "1: layout.a.data_parallel=replicate from beside the searched space: 25.00% faster than the best"
    assert any(line.startswith(said) for line in sentences(one))
    assert sum(", replicate;" in line for line in summary(one)) == 1  # each layout is described once
    assert not any(", replicate;" in line for line in sentences(one))
    assert candidate(tp=1).describe().endswith("1f1b, 1 micro-batch")
