"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def ranks(pool: Pool) -> Callable[..., list[Any]]:
    """ranks(n, fn, *args, timeout=60): fn(*args) on n gloo ranks, results in rank order."""
    return pool.run
