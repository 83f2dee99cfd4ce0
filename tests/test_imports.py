"""Imports run downwards only: mm -> encoders, llm -> parallel."""

from __future__ import annotations

import ast
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
NO_TORCH = ("parallel/layout.py", "mm/errors.py")


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide their direction"
            found.add(node.module.split(".")[0])
    return found


def files() -> list[str]:
    return [str(p.relative_to(ROOT)) for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("file", files())
def test_imports_run_downwards(file: str) -> None:
    used = imported((ROOT / file).read_text())
    room = file.split("/")[0]
    assert used & (set(MAY_IMPORT) | OTHERS) <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", NO_TORCH)
def test_pure_modules_import_no_torch(file: str) -> None:
    assert not imported((ROOT / file).read_text()) & {"torch", "numpy"}


def test_the_check_sees_imports_in_functions_and_for_typing() -> None:
    source = "def f():\n    from llm.model import LLM\nif TYPE_CHECKING:\n    import mm.step as s\n"
    assert imported(source) == {"llm", "mm"}
