"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from tests.pool import Pool

# A busy machine makes single examples slow now and then, which says nothing about the code.
settings.register_profile("polyrank", deadline=None)
settings.load_profile("polyrank")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=280, help="random cases of the boundary's property test")


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
def alone() -> Iterator[Callable[..., list[Any]]]:
    """As `ranks`, for one rank: alone(1, fn, *args) runs in this process, which starts nothing."""

    import torch.distributed as dist

    def run(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        assert n == 1
        return [fn(*args)]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield run
    dist.destroy_process_group()
