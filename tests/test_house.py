"""Bounds that keep the house easy to live in: short files and functions, few parameters, named fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.pages import PACKAGES, ROOT, name_of

OTHERS = ("tests", "benchmarks", "examples")
FILES = sorted(name_of(p) for folder in (*PACKAGES, *OTHERS) for p in (ROOT / folder).rglob("*.py"))
LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
POSITIONAL = 7  # so many values in a row and nobody knows which is which
FACTORY = {"device", "dtype"}  # count as one, as in torch
# Calls of other people's functions, which take values by position alone.
FOREIGN = {"save_for_backward", "apply", "add_row"}
FOREIGN_PREFIXES = ("torch.ops.", "self._lib.")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    own = [n for n in names if n not in ("self", "cls")]
    return len([n for n in own if n not in FACTORY]) + bool(FACTORY & set(own))


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def broken(file: str, source: str) -> list[str]:
    """What of a file breaks a bound."""
    tree = ast.parse(source)
    out = [f"{file} has {source.count(chr(10))} lines"] if source.count("\n") > LINES else []
    for f in functions(tree):
        if (n := (f.end_lineno or 0) - f.lineno + 1) > FUNCTION_LINES:
            out.append(f"{file}: {f.name} has {n} lines")
        if file.split("/")[0] in PACKAGES and (n := parameters(f)) > PARAMETERS:
            out.append(f"{file}: {f.name} has {n} parameters; a record would name them")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) >= POSITIONAL and file.split("/")[0] in PACKAGES:
            starred = any(isinstance(a, ast.Starred) for a in node.args)
            foreign = called(node) in FOREIGN or ast.unparse(node.func).startswith(
                ("torch.ops.", "self._lib.")
            )
            if not starred and not foreign:
                out.append(f"{file}:{node.lineno}: {len(node.args)} values by position in {called(node)}()")
    return out


def test_bounds() -> None:
    found = [line for file in FILES for line in broken(file, (ROOT / file).read_text())]
    assert not found, "\n".join(found)


def test_the_bounds_are_noticed() -> None:
    long = "def f(self, a, b, c, d, e, f, g, h, device, dtype):\n" + "    pass\n" * 400
    assert len(broken("mm/x.py", long)) == 3
    assert broken("mm/x.py", "Job(1, 2, 3, 4, 5, 6, 7)\n")
    assert not broken("mm/x.py", "def f(self, a, b, c, d, e, f, *, device, dtype): pass\n")
