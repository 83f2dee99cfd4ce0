"""Batches that a run leaves out. Pure.

Batches and steps count from 0 here, and from 1 where people write and read them. A step takes the next batch
that is not left out, so a run has as many steps with skips as without, and later batches stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """Batches first .. last, both among them."""

    first: int
    last: int


@dataclass(frozen=True)
class Skips:
    """spans: ascending, and with a batch between them."""

    spans: tuple[Span, ...] = ()

    @staticmethod
    def of(spans: Iterable[Sequence[int]]) -> Skips:
        """Those of spans [first, last] that may overlap."""
        out: list[Span] = []
        for first, last in sorted((int(a), int(b)) for a, b in spans):
            if out and first <= out[-1].last + 1:
                out[-1] = Span(out[-1].first, max(last, out[-1].last))
            else:
                out.append(Span(first, last))
        return Skips(tuple(out))

    @staticmethod
    def parse(entries: Iterable[int | str]) -> Skips:
        """Those of a config: 7, or "7-9", counted from 1. Raises ValueError."""
        spans = []
        for entry in entries:
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(entry))
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
            if not 1 <= first <= last:
                raise ValueError(
                    f"{entry!r} names no batches; needed: a number from 1, or a range such as 7-9"
                )
            spans.append((first - 1, last - 1))
        return Skips.of(spans)

    def batch(self, step: int) -> int:
        """The batch that a step takes."""
        for first, last in self.spans:
            if step < first:
                break
            step += last - first + 1
        return step

    def before(self, step: int) -> int:
        """How many batches have been taken or left out when a step begins; those left out right before it
        are not among them."""
        return self.batch(step - 1) + 1 if step else 0

    def passed(self, step: int) -> Skips:
        """Those among the batches before(step)."""
        return Skips(tuple(s for s in self.spans if s.first < self.before(step)))

    def with_more(self, others: Skips) -> Skips:
        """Both together."""
        return Skips.of([*self.spans, *others.spans])

    def written(self) -> list[str]:
        """As parse() takes them."""
        return [f"{a + 1}" if a == b else f"{a + 1}-{b + 1}" for a, b in self.spans]


NONE = Skips()
