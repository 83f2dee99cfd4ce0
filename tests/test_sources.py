"""Design laws that the sources show by themselves: no ambient state (law 6), no literal backend (law 8)."""

from __future__ import annotations

import ast

from tests.pages import PACKAGES, ROOT, name_of

FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
CHANGES = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popleft", "remove",
    "setdefault", "update",
}  # fmt: skip
# Registries, by the file that owns them.
REGISTRIES = {("encoders/registry.py", "_registry"), ("mm/data/probes.py", "_probes")}
COMPATIBILITY = {("encoders/compat.py", "_libraries")}  # repairs imports of other packages, once a process
# The doctor reports which backends a machine has, and joins two ranks over one of them; the checker has a
# model of each.
NAMES_BACKENDS = {"mm/commands/doctor.py", "parallel/schedule/checker/check.py"}


def names_at_module_level(tree: ast.Module) -> set[str]:
    """Names that a module assigns outside functions and classes."""
    found = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def changed_by_functions(source: str) -> set[str]:
    """Module-level names that functions of the module assign to, or change in place."""
    tree = ast.parse(source)
    known, found = names_at_module_level(tree), set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                found |= {node.value.id} & known if isinstance(node.value, ast.Name) else set()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if node.func.attr in CHANGES and isinstance(owner, ast.Name):
                    found |= {owner.id} & known
    return found


def test_the_check_sees_what_functions_change() -> None:
    source = "A = {}\nB = []\nC = []\nn = 0\ndef f():\n    global n\n    A[1] = 2\n    B.append(C[0])\n"
    assert changed_by_functions(source) == {"A", "B", "n"}


def test_only_registries_are_state_at_module_level() -> None:
    found = {(name_of(file), name) for file in FILES for name in changed_by_functions(file.read_text())}
    assert found <= REGISTRIES | COMPATIBILITY


def test_no_backend_is_a_literal() -> None:
    found = {
        name_of(file)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("gloo", "nccl", "mpi", "ucc")
    }
    assert found <= NAMES_BACKENDS
