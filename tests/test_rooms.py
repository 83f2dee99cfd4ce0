"""Every package says what it is for and names its public API; what encoder authors import stays put."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.pages import PACKAGES, ROOT

ROOMS = sorted(
    str(init.parent.relative_to(ROOT)).replace("/", ".")
    for package in PACKAGES
    for init in (ROOT / package).rglob("__init__.py")
)


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_says_what_it_is_for(room: str) -> None:
    said = importlib.import_module(room).__doc__ or ""
    assert len(re.findall(r"\.(?:\s|$)", said)) >= 2, f"{room}: two sentences are needed, given {said!r}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_names_what_is_public(room: str) -> None:
    module = importlib.import_module(room)
    names = list(getattr(module, "__all__", ()))
    entries = re.search(r"Entry points: ([\w., \n]+?)\.\s", module.__doc__ or "")
    for entry in re.split(r",\s*", entries[1]) if entries else ():
        part, name = entry.split(".")
        assert hasattr(importlib.import_module(f"{room}.{part}"), name), entry
        names.append(entry)
    missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    assert not missing
    assert names or room in PACKAGES, f"{room} names nothing that others may use"


def test_what_encoder_authors_import_is_described() -> None:
    from encoders import api

    assert api.__doc__ is not None
    described = set(re.findall(r"\w+", api.__doc__))
    assert not set(api.__all__) - described
    assert all(hasattr(api, name) for name in api.__all__)


def test_examples_import_from_the_public_module_alone() -> None:
    for file in (ROOT / "examples").glob("*_encoder.py"):
        ours = re.findall(r"^(?:from|import) (encoders|parallel|llm|mm)([\w.]*)", file.read_text(), re.M)
        assert ours and set(ours) == {("encoders", ".api")}, (file.name, ours)
