"""The worked example that routes.py opens with is what the code does."""

from __future__ import annotations

import doctest

from parallel.boundary import routes


def test_the_worked_example_of_four_ranks() -> None:
    done = doctest.testmod(routes)
    assert done.attempted >= 5 and not done.failed
