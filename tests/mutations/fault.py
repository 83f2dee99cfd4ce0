"""A fault of one line.

Old texts are short, so that they outlive changes around them; tests/test_mutations.py says where one no
longer fits. Tests that start no processes are preferred.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """name: room.word; what: the fault in words; old, new: exact text in `file`, where old occurs once; test:
    the pytest node that catches it."""

    name: str
    what: str
    file: str
    old: str
    new: str
    test: str

    def applied(self, text: str) -> str:
        """`text` with the fault in it."""
        if (n := text.count(self.old)) != 1:
            raise ValueError(f"fault {self.name}: {self.old!r} occurs {n} times in {self.file}; needed: once")
        return text.replace(self.old, self.new)


ONE_STEP = "tests/mm/jobs/test_reference.py::test_one_process_is_the_straight_line_program[one process]"
OBJECTIVES = (
    "tests/mm/jobs/test_reference.py::test_one_process_is_the_straight_line_program[objectives, one process]"
)
