"""The list of faults fits the sources: every old text occurs once, and every test that it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.__main__ import table
from tests.mutations.fault import Fault
from tests.mutations.faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_still_fits(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    assert fault.applied(text) != text
    ast.parse(fault.applied(text))
    file, _, test = fault.test.partition("::")
    tests = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert not test or test.partition("[")[0] in tests, f"{fault.test} is gone"


def test_faults_are_many_apart_and_in_every_room() -> None:
    assert len(FAULTS) >= 40 and len({f.name for f in FAULTS}) == len(FAULTS)
    assert len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
    assert {f.file.split("/")[0] for f in FAULTS} == {"parallel", "encoders", "llm", "mm"}


def test_the_table_in_the_docs_is_the_list() -> None:
    assert table() in (ROOT / "docs" / "testing.md").read_text()
