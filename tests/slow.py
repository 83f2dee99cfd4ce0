"""Marks for parameters of tests that run on demand (make all), so that make test stays below ten minutes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def on_demand(values: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which those in `slow` are marked so."""
    found, given = list(values), list(slow)
    assert all(value in found for value in given), "a value that is no parameter"
    return [pytest.param(v, marks=pytest.mark.slow) if v in given else v for v in found]
