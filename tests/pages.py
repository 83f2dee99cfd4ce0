"""The pages of the docs as text: their links, anchors, code and the paths, names and commands in it."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("parallel", "encoders", "llm", "mm")
FOLDERS = (*PACKAGES, "tests", "docs", "benchmarks", "configs", "examples", ".github", ".ci")
# The sources that cite laws and pages.
SOURCES = sorted(
    file
    for folder in (*PACKAGES, "tests", "benchmarks", "examples", "configs")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".yaml")
)
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for f in ("docs", "benchmarks", "configs", ".github") for page in (ROOT / f).rglob("*.md")),
    ]
)
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")  # NAME in llm/NAME.py


class Found(NamedTuple):
    """Something that a page says: where, for messages, and what."""

    where: str
    text: str


def name_of(file: Path) -> str:
    """A file as messages call it."""
    return str(file.relative_to(ROOT))


@cache
def text_of(page: Path) -> str:
    return page.read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", without_blocks(text_of(page)), re.M):
        plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def headings(page: Path) -> set[str]:
    """The headings of a page as they stand."""
    return set(re.findall(r"^#+ +(.+)$", without_blocks(text_of(page)), re.M))


def without_blocks(text: str) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def code(page: Path) -> list[str]:
    """What stands in backticks, and the lines of indented and fenced code with continued lines joined."""
    text = text_of(page)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(text))
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^ {4}.*$", without_blocks(text), re.M)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").split("\n")
    return [*inline, *lines]


def links(page: Path) -> list[str]:
    """Where a page's links lead, but to other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text_of(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def paths(words: str) -> list[str]:
    """Paths below the repository's folders in a piece of code, braces expanded."""
    found = []
    for word in re.findall(r"[\w./*{},-]+(?:::\w+)?", words):
        for one in expanded(word.rstrip(".,")):
            if one.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
                found.append(one)
    return found


def expanded(word: str) -> list[str]:
    """a/{b,c}.d as a shell expands it."""
    match = re.fullmatch(r"([^{}]*)\{([^{}]*)\}(.*)", word)
    if match is None:
        return [] if "{" in word or "}" in word else [word]
    return [f"{match[1]}{choice}{match[3]}" for choice in match[2].split(",")]


def exists(path: str) -> bool:
    """Whether a path, a pattern, or a test as pytest names it is there."""
    file, _, test = path.partition("::")
    if "*" in file:
        return any(ROOT.glob(file))
    if not (ROOT / file).exists():
        return False
    return not test or f"\ndef {test}(" in text_of(ROOT / file)


def dotted_names(words: str) -> list[str]:
    """Names of ours with dots, such as parallel.boundary.source_side, that stand alone or are called."""
    packages = "|".join((*PACKAGES, "tests", "benchmarks", "examples"))
    return re.findall(rf"(?<![\w./:@-])((?:{packages})(?:\.[A-Za-z_]\w*)+)(?![\w/:=-])", words)


def resolves(name: str) -> bool:
    """Whether a dotted name can be imported: a module, or something in one, fields of records included."""
    parts = name.split(".")
    n = next((n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n]))), 0)
    if n == len(parts):  # not imported: a benchmark may need a package that is not installed
        return True
    thing = importlib.import_module(".".join(parts[:n])) if n else None
    for part in parts[n:]:
        if hasattr(thing, part):
            thing = getattr(thing, part)
        elif part not in getattr(thing, "__annotations__", {}):
            return False
    return True


def is_module(name: str) -> bool:
    """Whether there is a module or package of this name."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what should be a package is none
        return False


def runs(module: str) -> bool:
    """Whether `python -m module` names something that can be run."""
    spec = importlib.util.find_spec(module) if is_module(module) else None
    return spec is not None and (spec.submodule_search_locations is None or is_module(f"{module}.__main__"))
