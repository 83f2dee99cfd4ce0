"""Imports run downwards only: mm -> encoders, llm -> parallel."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "mm": {"mm", "encoders", "llm", "parallel"},
    "encoders": {"encoders", "parallel"},
    "llm": {"llm", "parallel"},
    "parallel": {"parallel"},
}
OTHERS = {"tests", "benchmarks", "examples"}
NO_TORCH = ("parallel/topology/layout.py", "mm/errors.py")


def imported(source: str) -> set[str]:
    """Full names of what a module imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide their direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def head(name: str, n: int = 1) -> str:
    return ".".join(name.split(".")[:n])


def files() -> list[str]:
    return [str(p.relative_to(ROOT)) for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("file", files())
def test_imports_run_downwards(file: str) -> None:
    used = {head(name) for name in imported((ROOT / file).read_text())}
    room = file.split("/")[0]
    assert used & (set(MAY_IMPORT) | OTHERS) <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", NO_TORCH)
def test_pure_modules_import_no_torch(file: str) -> None:
    assert not {head(name) for name in imported((ROOT / file).read_text())} & {"torch", "numpy"}


def test_no_parts_of_a_room_import_each_other() -> None:
    """Parts are its modules and its subpackages. Not over a third one either: there is an order in which each
    comes after those that it imports."""
    used: dict[str, set[str]] = {}
    for file in files():
        part = head(file.removesuffix(".py").replace("/", "."), 2)
        others = {head(name, 2) for name in imported((ROOT / file).read_text())}
        used.setdefault(part, set()).update(others - {part})
    order = list(TopologicalSorter(used).static_order())  # raises CycleError, which names them
    for earlier, later in pairwise(("parallel.boundary", "parallel.comm.fetch", "parallel.context_parallel")):
        assert order.index(earlier) < order.index(later)


def test_the_check_sees_imports_in_functions_and_for_typing() -> None:
    source = "def f():\n    from llm.model import LLM\nif TYPE_CHECKING:\n    import mm.train.step as s\n"
    assert imported(source) == {"llm.model.LLM", "mm.train.step"}
