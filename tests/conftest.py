"""Shared fixtures, and marks: a test that uses `ranks`, `strict` or `pool` is marked dist, one that uses
`processes` e2e, and no other can start a process. `make check` runs those others."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.pool import Pool

# A busy machine makes single examples slow now and then, which says nothing about the code.
settings.register_profile("polyrank", deadline=None)
# Where it only matters whether an example fails (tests/mutations), not which one is the simplest.
unshrunk = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]
settings.register_profile("unshrunk", deadline=None, phases=unshrunk)
settings.load_profile("polyrank")

MARKS = {"pool": "dist", "processes": "e2e"}  # by fixture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=280, help="random cases of the boundary's property test")
    parser.addoption("--browser", type=Path, help="Chromium for tests of pages (docs/testing.md)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in MARKS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKS[fixture])


def pytest_collection_finish() -> None:
    gc.freeze()  # what test modules import stays: full collections, which look at all of it, take 0.3 s each


@pytest.fixture
def processes() -> None:
    """Lets a test start processes of its own."""


@pytest.fixture(autouse=True)
def starts_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the marks true: a test without one cannot start a process."""

    def refuse(*given: Any, **named: Any) -> None:
        pytest.fail(f"a test that starts processes uses the fixture `processes`; started: {given[1:2]}")

    if not MARKS.keys() & set(request.fixturenames):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def ranks(pool: Pool) -> Callable[..., list[Any]]:
    """ranks(n, fn, *args, timeout=60): fn(*args) on n gloo ranks, results in rank order."""
    return pool.run


@pytest.fixture
def strict(pool: Pool) -> Callable[..., list[Any]]:
    """strict(n, fn, *args, eager=False, timeout=120): as `ranks`, under NCCL's rules (tests/strict)."""
    from tests.strict.run import run_strict

    return partial(run_strict, pool)


@pytest.fixture
def alone() -> Iterator[Callable[..., list[Any]]]:
    """As `ranks`, for one rank: alone(1, fn, *args) runs in this process, which starts nothing."""
    import torch.distributed as dist

    def run(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        assert n == 1
        return [fn(*args)]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield run
    dist.destroy_process_group()
