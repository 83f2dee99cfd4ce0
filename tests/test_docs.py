"""The pages say what is there: laws, links, paths, names and commands that they or the sources name."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages import (
    PACKAGES,
    PAGES,
    PLACEHOLDER,
    ROOT,
    SOURCES,
    Found,
    anchors,
    code,
    dotted_names,
    exists,
    headings,
    links,
    name_of,
    paths,
    resolves,
    runs,
    text_of,
)

DOCS = ROOT / "docs"
# A screen and a half.
LONGEST_MAP = 75
# Paths that a reader makes.
READERS_OWN = {"configs/mine.yaml"}
# Words that the field has a better one for (docs/glossary.md) as an identifier, or as a part of one between
# underscores. Add a word when the last identifier that has it is renamed.
RETIRED = (
    *("granule", "granules", "pulse", "Beat", "told", "Pass", "cut_layers"),
    *("beside", "apart", "says", "asks", "whom", "deed", "Deed", "Lane", "Meeting"),
    *("beat", "kw", "cut", "cuts", "words", "further", "settle", "let_go", "choose_method"),
)


def cited_laws(text: str) -> list[int]:
    """The numbers in "law 2", "laws 1 to 3", "design laws 4, 5 and 6"."""
    found = re.findall(r"\b[Ll]aws?\s+(\d+(?:(?:,\s*|\s+and\s+|\s+to\s+|\s*-\s*)\d+)*)", text)
    return [int(n) for group in found for n in re.findall(r"\d+", group)]


def test_laws_are_numbered() -> None:
    numbers = re.findall(r"^## (\d+)\. \w", text_of(DOCS / "laws.md"), re.M)
    assert numbers == [str(n) for n in range(1, 9)]
    assert text_of(DOCS / "laws.md").count("How it is tested:") == 8


def test_every_law_that_is_cited_is_one() -> None:
    known = set(range(1, 9))
    wrong = [
        f"{name_of(f)}: law {n}" for f in [*SOURCES, *PAGES] for n in set(cited_laws(text_of(f))) - known
    ]
    assert not wrong
    assert cited_laws("(design law 2); laws 1, 3\nand 5; Law 7") == [2, 1, 3, 5, 7]


def page_citations(text: str) -> list[tuple[str, str, str]]:
    """(page, anchor, heading) of each "docs: layouts", "docs/llm.md#stages" and 'docs/llm.md, "Stages"'."""
    found = re.findall(r"\(docs: ([a-z_]+)(?:#([\w-]+))?()", text)
    return found + re.findall(r"\bdocs/([\w/-]+)\.md(?:#([\w-]+)|,\s+\"([^\"]+)\")?", text)


@pytest.mark.parametrize("kind", ["sources", "pages"])
def test_every_page_that_is_cited_is_there(kind: str) -> None:
    wrong = []
    for file in SOURCES if kind == "sources" else PAGES:
        if file == Path(__file__):
            continue
        for page, anchor, heading in page_citations(text_of(file)):
            at = DOCS / f"{page}.md"
            if not at.exists():
                wrong.append(f"{name_of(file)}: docs/{page}.md")
            elif (anchor and anchor not in anchors(at)) or (heading and heading not in headings(at)):
                wrong.append(f"{name_of(file)}: docs/{page}.md has no {anchor or heading}")
    assert not wrong
    assert page_citations('(docs: llm#a); docs/x/y.md, "Z"') == [("llm", "a", ""), ("x/y", "", "Z")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            wrong.append(link)
        elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
            wrong.append(f"{link}: no such heading")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_are_there(page: Path) -> None:
    named = {path for words in code(page) for path in paths(words) if not PLACEHOLDER.search(path)}
    assert not sorted(path for path in named - READERS_OWN if not exists(path))


def test_the_check_of_paths_sees_files_patterns_and_tests() -> None:
    seen = paths("python benchmarks/a.py configs/{x,y}.yaml; `tests/test_docs.py::test_gone` runs/here")
    assert seen == ["benchmarks/a.py", "configs/x.yaml", "configs/y.yaml", "tests/test_docs.py::test_gone"]
    assert not any(map(exists, seen)) and exists("configs/*.yaml")
    assert exists("tests/test_docs.py::test_paths_are_there")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_can_be_imported(page: Path) -> None:
    named = {name for words in code(page) for name in dotted_names(words) if not PLACEHOLDER.search(name)}
    for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)", "\n".join(code(page)), re.M):
        if module.split(".")[0] in PACKAGES:
            named |= {f"{module}.{name}" for name in re.split(r",\s*", names.strip())}
    assert not sorted(name for name in named if not resolves(name))


def test_the_check_of_names_sees_functions_fields_and_modules() -> None:
    assert dotted_names("parallel.boundary.plan_edge(..) mm/x.py llm.pp=2 llm.model") == [
        "parallel.boundary.plan_edge",
        "llm.model",
    ]
    assert resolves("parallel.topology.axis.Axes.tp") and resolves("llm.config")
    assert not resolves("llm.config.GONE") and not resolves("llm.gone")


def commands(page: Path) -> list[Found]:
    """The modules and scripts that a page runs, and the targets that it makes."""
    found = []
    for words in code(page):
        for module in re.findall(r"(?:python3?|torchrun)\b(?:[^|;&#]*?)\s-m ([\w.]+)", words):
            found.append(Found("module", module))
        for script in re.findall(r"\bpython3? (\S+\.py)\b", words):
            found.append(Found("script", script))
        for command in re.findall(r"-m mm ([a-z]+)\b", words):
            found.append(Found("command", command))
        for target in re.findall(r"(?:^\s*|^)make ([a-z]+)\b", words):
            found.append(Found("target", target))
    return [f for f in found if not PLACEHOLDER.search(f.text)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    from mm.cli import COMMANDS

    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    there: dict[str, Callable[[str], bool]] = {
        "module": runs,
        "script": lambda script: (ROOT / script).exists(),
        "command": lambda word: word in COMMANDS,
        "target": lambda word: word in targets,
    }
    assert not [f"{f.where} {f.text}" for f in commands(page) if not there[f.where](f.text)]


def test_the_map_fits_a_screen_and_a_half_and_names_every_room() -> None:
    page = DOCS / "architecture.md"
    assert len(text_of(page).splitlines()) <= LONGEST_MAP
    rooms = {
        f"{name_of(init.parent)}/" for p in ("parallel", "mm") for init in (ROOT / p).glob("*/__init__.py")
    }
    named = {path for words in code(page) for path in paths(words)}
    assert not sorted(rooms - named)


def test_every_page_is_in_an_index() -> None:
    for folder in (DOCS, DOCS / "decisions"):
        listed = {link.partition("#")[0] for link in links(folder / "README.md")}
        pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
        assert not sorted(pages - listed), f"docs that {name_of(folder)}/README.md does not list"


def test_decisions_have_one_form() -> None:
    for page in set((DOCS / "decisions").glob("*.md")) - {DOCS / "decisions" / "README.md"}:
        parts = re.findall(r"^\*\*(\w+)\.\*\*", text_of(page), re.M)
        assert parts == ["Context", "Decision", "Consequences", "Alternatives"], name_of(page)


def test_every_schedule_and_layer_is_on_its_page() -> None:
    from llm.config import KINDS
    from parallel.schedule.generators.orders import PIPELINES

    schedules, llm = text_of(DOCS / "schedules.md"), text_of(DOCS / "llm.md")
    assert not [kind for kind in ("auto", *PIPELINES) if f"`{kind}`" not in schedules]
    assert not [symbol for symbol in KINDS if f"`{symbol}`" not in llm]


def test_every_benchmark_is_in_the_index() -> None:
    index = text_of(ROOT / "benchmarks" / "README.md")
    programs = [p for p in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in p.read_text()]
    named = [name_of(p).removesuffix(".py").replace("/", ".") for p in programs]
    assert named and not [name for name in named if f"-m {name}" not in index]


def retired_in(source: str) -> set[str]:
    """The retired words among the identifiers of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    names = {t.string for t in tokens if t.type == tokenize.NAME}
    return {word for word in RETIRED for name in names if word == name or word in name.split("_")}


def test_retired_words_do_not_come_back() -> None:
    found = {
        name_of(file): words
        for file in SOURCES
        if name_of(file).split("/")[0] in PACKAGES and file.suffix == ".py"
        if (words := retired_in(file.read_text()))
    }
    assert not found
    assert retired_in("def f(granule_size):\n    pass  # Pass\n") == {"granule"}
