"""A rank's flight record: its last actions, and what it does now."""

from __future__ import annotations

import mmap
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.schedule.action import Action

SIZE = 512  # entries that are kept: some steps of most jobs
SHOWN = 256  # bytes of a window
_OPEN, _ENDED = b"+-"


@dataclass(slots=True)
class Entry:
    """Something that a rank did, or does.

    what: an action of a schedule, or words such as "data" and "update". step: from 1; 0 before the first.
    extra_s: seconds beyond run.timeout_s that it may take; None: it may take any time. Times are
    time.perf_counter(); ended: 0.0 while it lasts.
    """

    what: Action | str
    step: int
    began: float
    extra_s: float | None = 0.0
    ended: float = 0.0

    def __str__(self) -> str:
        return f"{described(self.what)} in step {self.step}" if self.step else described(self.what)


def described(what: Action | str) -> str:
    """An entry's work in words, its module first where it has one."""
    if isinstance(what, str):
        return what
    at = f"{what.module} stage {what.stage}" if what.stage else what.module
    first, last = what.microbatch, what.microbatch + what.span - 1
    which = f"micro-batch {first}" if first == last else f"micro-batches {first} to {last}"
    return f"{at}, {what.kind.value.replace('_', ' ')} of {which}"


class Window:
    """Shows what a rank does now to processes that may read its files, even while it cannot run itself."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open while the rank trains
        self._file.truncate(SHOWN)
        self.number = self._file.fileno()
        self.bytes = mmap.mmap(self.number, SHOWN)

    def show(self, text: str) -> None:
        """Something begins."""
        line = b"+" + text.encode()[: SHOWN - 2] + b"\n"
        self.bytes[: len(line)] = line

    def end(self) -> None:
        """What was shown has ended."""
        self.bytes[0] = _ENDED

    def close(self) -> None:
        """Show nothing any more."""
        self.bytes.close()
        self._file.close()


def shown(content: bytes) -> str:
    """What a window with these bytes says; "" where it is empty."""
    if content[:1] not in (bytes([_OPEN]), bytes([_ENDED])):
        return ""
    text = content[1:].partition(b"\n")[0].decode(errors="replace")
    return text if content[0] == _OPEN else f"what follows {text}"


class FlightRecord:
    """The last `size` entries of one rank. One thread writes; others may read at any time.

    step: number of the step that is under way, from 1. phase: what the rank does outside of entries.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.step, self.phase = 0, "making ready"
        self.count = 0  # entries so far
        self._ring: list[Entry | None] = [None] * size
        self._open: list[Entry] = []
        self.window: Window | None = None

    def begin(self, what: Action | str, extra_s: float | None = 0.0) -> None:
        """Something begins, inside what is under way."""
        entry = Entry(what, self.step, time.perf_counter(), extra_s)
        self._ring[self.count % len(self._ring)] = entry
        self.count += 1
        self._open.append(entry)
        if self.window is not None:
            self.window.show(str(entry))

    def end(self) -> None:
        """What began last has ended."""
        self._open.pop().ended = time.perf_counter()
        if self.window is not None:
            self.window.end()

    def end_action(self) -> None:
        """An action has ended, or the second of a pair, whose entry has ended with the first."""
        if self._open and not isinstance(self._open[-1].what, str):
            self.end()

    @contextmanager
    def doing(self, what: str, extra_s: float | None = None) -> Iterator[None]:
        """An entry for what is done inside. Where that raises, the entry stays open: it tells where."""
        self.begin(what, extra_s)
        yield
        self.end()

    def now(self) -> Entry | None:
        """What is under way, the innermost; None between entries."""
        try:
            return self._open[-1]
        except IndexError:
            return None

    def __str__(self) -> str:
        """What the rank does now, in words."""
        entry = self.now()
        if entry is not None:
            return str(entry)
        return f"{self.phase}, after step {self.step}" if self.step else self.phase

    def forget(self) -> None:
        """Nothing is under way any more: an error has left it."""
        self._open.clear()

    def to_json(self) -> list[dict[str, Any]]:
        """The entries, oldest first, as plain data; seconds ago."""
        now, n = time.perf_counter(), len(self._ring)
        kept = [self._ring[i % n] for i in range(max(0, self.count - n), self.count)]
        return [
            {
                "what": described(e.what),
                "step": e.step,
                "began_s_ago": round(now - e.began, 6),
                "took_s": round(e.ended - e.began, 6) if e.ended else None,
            }
            for e in kept
            if e is not None
        ]
