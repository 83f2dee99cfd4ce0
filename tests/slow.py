"""Marks for parameters of tests that run on demand (make all), so that make test stays below ten minutes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def on_demand(values: Iterable[Any], slow: Collection[Any], *, several: bool = False) -> list[Any]:
    """Parameters of a test, of which those in `slow` are marked so. several: a value is one of each name."""
    found, given = list(values), list(slow)
    assert all(value in found for value in given), "a value that is no parameter"
    marks = [(pytest.mark.slow,) if v in given else () for v in found]
    return [pytest.param(*(v if several else (v,)), marks=mark) for v, mark in zip(found, marks, strict=True)]
