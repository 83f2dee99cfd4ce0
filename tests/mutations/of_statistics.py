"""Faults in the statistics by layer."""

from __future__ import annotations

from tests.mutations.fault import Fault

TEST = "tests/mm/train/test_statistics.py::test_layers_are"

STATISTICS = (
    Fault(
        "statistics.copies",
        "tokens that all tp ranks have count on each of them",
        "mm/train/statistics.py",
        "if axes.tp.rank and not inner.sequence_parallel:",
        "if axes.tp.rank and False:",
        f"{TEST}_the_same_in_any_layout[tp and cp]",
    ),
    Fault(
        "statistics.padding",
        "padding counts in what layers give",
        "mm/train/statistics.py",
        "x = x[: _real(args[1], len(x), axes)]",
        "x = x[:]",
        f"{TEST}_the_same_in_any_layout[tp and cp]",
    ),
    Fault(
        "optim.largest",
        "a layer's largest gradient is that of its last parameter",
        "mm/train/statistics.py",
        'largest.scatter_reduce_(0, at, found.largest, "amax")',
        "largest.scatter_(0, at, found.largest)",
        f"{TEST}_those_of_plain_hooks",
    ),
)
