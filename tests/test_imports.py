"""Imports run downwards only, between packages, between the rooms of a package, and between files."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.pages import ROOT, name_of

MAY_IMPORT = {
    "mm": {"mm", "encoders", "llm", "parallel"},
    "encoders": {"encoders", "parallel"},
    "llm": {"llm", "parallel"},
    "parallel": {"parallel"},
}
# The rooms of a package, the lowest first: each may import those before it (docs/architecture.md).
ORDER = {
    "parallel": (
        "topology",
        "sequence",
        "comm",
        "sharding",
        "checkpoint",
        "published",
        "tensor_parallel",
        "expert_parallel",
        "context_parallel",
        "boundary",
        "schedule",
    ),
    "parallel/schedule": (
        "action",
        "record",
        "plan",
        "alike",
        "checker",
        "simulator",
        "generators",
        "executor",
        "drawing",
    ),
    "mm": (
        "errors",
        "forks",
        "faults",
        "data",
        "order",
        "containers",
        "config",
        "plan",
        "ranks",
        "checkpoint",
        "inference",
        "report",
        "train",
        "virtual",
        "predict",
        "search",
        "compare",
        "pages",
        "commands",
        "cli",
    ),
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


@cache
def names(file: str) -> frozenset[str]:
    """imported() of a file."""
    return frozenset(imported((ROOT / file).read_text()))


def head(name: str, n: int = 1) -> str:
    return ".".join(name.split(".")[:n])


@cache
def files() -> tuple[str, ...]:
    return tuple(name_of(p) for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py")))


@cache
def modules() -> dict[str, str]:
    """Files by the names that they are imported by."""
    return {f.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): f for f in files()}


@cache
def arrows() -> dict[str, frozenset[str]]:
    """By file, the files that it imports. A name that a package hands on counts as the package's."""
    return {file: frozenset(map(source, names(file))) - {"", file} for file in files()}


def source(name: str) -> str:
    """The file that an imported name is from: that of the longest part that is a module, or ""."""
    parts = name.split(".")
    heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((modules()[h] for h in heads if h in modules()), "")


def child(folder: str, file: str) -> str:
    """The file or the subfolder directly in `folder` that a file below it is, or is in."""
    return file.removeprefix(folder + "/").split("/")[0].removesuffix(".py")


def order_of(graph: dict[str, set[str]]) -> list[str]:
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def test_packages_import_downwards() -> None:
    up = [
        f"{file} imports {name}"
        for file in files()
        for name in names(file)
        if head(name) in (set(MAY_IMPORT) | OTHERS) - MAY_IMPORT[file.split("/")[0]]
    ]
    assert not up


@pytest.mark.parametrize("folder", ORDER)
def test_rooms_import_downwards(folder: str) -> None:
    """The order names every room, and no arrow goes to a later one."""
    order = ORDER[folder]
    inside = [f for f in files() if f.startswith(folder + "/")]
    assert {child(folder, f) for f in inside} - {"__init__", "__main__"} == set(order)
    up = [
        f"{file} -> {other}"
        for file in inside
        for other in arrows()[file]
        if child(folder, file) in order and other.startswith(folder + "/") and child(folder, other) in order
        if order.index(child(folder, file)) < order.index(child(folder, other))
    ]
    assert not up


def test_no_files_import_each_other() -> None:
    """Not over third ones either. A package whose __init__ hands on names comes after its files."""
    order_of({file: set(others) for file, others in arrows().items()})


@pytest.mark.parametrize("folder", sorted({str(Path(f).parent) for f in files()}))
def test_no_parts_of_a_folder_import_each_other(folder: str) -> None:
    """Parts are its files and its subfolders, whatever is below."""
    used: dict[str, set[str]] = defaultdict(set)
    for file in files():
        if file.startswith(folder + "/") and child(folder, file) != "__init__":
            others = {child(folder, f) for f in arrows()[file] if f.startswith(folder + "/")}
            used[child(folder, file)] |= others - {child(folder, file), "__init__"}
    order_of(used)


@pytest.mark.parametrize("file", NO_TORCH)
def test_pure_modules_import_no_torch(file: str) -> None:
    assert not {head(name) for name in names(file)} & {"torch", "numpy"}


def test_every_import_of_ours_is_there() -> None:
    """Type checkers take a module that is missing for anything at all."""
    missing = [
        f"{file}: {name}"
        for file in files()
        for name in names(file)
        if head(name) in MAY_IMPORT and name not in modules() and name.rpartition(".")[0] not in modules()
    ]
    assert not missing


def test_the_check_sees_imports_in_functions_and_for_typing() -> None:
    source = "def f():\n    from llm.model import LLM\nif TYPE_CHECKING:\n    import mm.train.step as s\n"
    assert imported(source) == {"llm.model.LLM", "mm.train.step"}
