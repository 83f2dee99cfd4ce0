"""Which samples a step takes, and how they are packed: pure, from (config, index, step, known-bad samples).

By number, a step takes train.global_batch samples, and any step is found in O(1). With data.pack it takes so
many packed sequences. Sequences are packed window by window: a window is a fixed number of positions of the
stream. How many sequences windows give is known only once they are packed, so where a step begins is a
cursor, (window, sequence). A checkpoint has it, and a run that resumes packs one window again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mm.config.schema import Config
from mm.data.sample import Index
from mm.errors import DataError
from mm.order.packing import pack, window_key
from mm.order.skips import NONE, Skips
from mm.order.stream import Stream
from mm.plan.dealing import Packed
from mm.plan.inputs import PlanInputs
from mm.plan.sources import check_length, stream_of
from mm.plan.step_plan import StepPlan, plan_table
from mm.plan.table import SampleTable
from parallel.sequence.intervals import Column

Lookup = Callable[[Column], SampleTable]  # SampleTable.take() of a table whose lines are all samples


class Cursor(NamedTuple):
    """Where a step begins: the sequence of a window."""

    window: int
    sequence: int


class _Ahead(NamedTuple):
    """The samples of steps first .. stop - 1, looked up together. bad, lookup: what they depend on too."""

    first: int
    stop: int
    bad: frozenset[int]
    lookup: Lookup
    table: SampleTable


START = Cursor(0, 0)
AHEAD = 1024  # samples that who plans step after step may look up at once
KEPT = 1000  # steps behind the last whose beginning is remembered: a few of them are planned again


class Windows(NamedTuple):
    """How sequences are packed. capacity: tokens of one. positions: of the stream in a window. skipped: ids
    of samples that the config leaves out, which are replaced before packing; ascending."""

    capacity: int
    positions: int
    skipped: Column


@dataclass(frozen=True)
class Batches:
    """The batches of a run. size: samples, or packed sequences, a step. windows: None where samples are taken
    by number. skips: batches that are left out. cursors: where steps begin, before what is left out there, as
    far as is known and remembered. ahead: samples by number that plan() looks up at once, of this step and
    the next ones; plans do not depend on it."""

    stream: Stream
    size: int
    windows: Windows | None = None
    skips: Skips = NONE
    cursors: dict[int, Cursor] = field(default_factory=lambda: {0: START}, compare=False)
    ahead: int = 1
    _packed: dict[int, tuple[Column, Column]] = field(default_factory=dict, compare=False, repr=False)
    _found: list[_Ahead] = field(default_factory=list, compare=False, repr=False)  # the last one

    @staticmethod
    def of(
        cfg: Config, index: Index, begins: tuple[int, Cursor] = (0, START), skips: Skips | None = None
    ) -> Batches:
        """Those of a run that trains on this index. begins: a step, and where it begins. skips: None for
        those of the config.

        Raises Refused and DataError where the sources do not serve."""
        stream, size = stream_of(cfg, index), cfg.train.global_batch
        skips = Skips.parse(cfg.data.skip) if skips is None else skips
        if cfg.data.pack is None:
            check_length(cfg, stream, skips)
            return Batches(stream, size, None, skips)
        windows = Windows(cfg.data.pack, cfg.data.window, _ascending(frozenset(index.skipped)))
        return Batches(stream, size, windows, skips, {begins[0]: begins[1]})

    def ids(self, step: int, bad: Collection[int] = ()) -> Column:
        """The samples of a step that are taken by number. bad: samples known to be unreadable or left out.

        Raises DataError where a sample can be replaced by no other.
        """
        positions = self.skips.batch(step) * self.size + np.arange(self.size)
        return self._ids(positions, _ascending(frozenset(bad)))

    def _ids(self, positions: Column, bad: Column) -> Column:
        ids, source = self.stream.at(positions)
        return self.stream.mended(positions, ids, source, bad)

    def plan(self, step: int, lookup: Lookup, inputs: PlanInputs, bad: Collection[int] = ()) -> StepPlan:
        """The plan of a step, counted from 0. bad: samples known to be unreadable or left out.

        A bad sample is replaced by another one. In a packed sequence its place stays empty instead: what is
        packed depends on no other ids than those that the config leaves out. Raises DataError as ids() does.
        """
        if self.windows is None:
            return plan_table(step, self._table(step, lookup, frozenset(bad)), inputs)
        ids, sequence = self.sequences(step, lookup)
        good = ~np.isin(ids, _ascending(frozenset(bad)))
        packed = Packed(sequence[good], self.size, self.windows.capacity)
        made = plan_table(step, lookup(ids[good]), inputs, packed)
        return replace(made, ends=self.cursors[step + 1])

    def _table(self, step: int, lookup: Lookup, bad: frozenset[int]) -> SampleTable:
        """The samples of a step that are taken by number. A thousand take little longer to shuffle and to
        look up than a few, so those of the next steps come with them."""
        found = next((f for f in self._found if f.first <= step < f.stop), None)
        if found is None or (found.bad, found.lookup) != (bad, lookup):
            end = self.stream.blend.end
            taken = np.array([self.skips.batch(s) for s in range(step, step + self.ahead // self.size)])
            taken = taken if end is None else taken[taken < end // self.size]
            stop = step + len(taken)
            if stop <= step + 1:
                return lookup(self.ids(step, bad))
            positions = (taken[:, None] * self.size + np.arange(self.size)).ravel()
            try:
                found = _Ahead(step, stop, bad, lookup, lookup(self._ids(positions, _ascending(bad))))
            except DataError:
                return lookup(self.ids(step, bad))  # a later step may be at fault
            self._found[:] = [found]
        first = (step - found.first) * self.size
        return found.table.take(np.arange(first, first + self.size))

    def sequences(self, step: int, lookup: Lookup) -> tuple[Column, Column]:
        """The samples of a step in packed sequences, and by sample the number of its sequence in the step."""
        known = step if step in self.cursors else max((s for s in self.cursors if s <= step), default=None)
        assert known is not None, f"step {step} is before {min(self.cursors)}, where the run resumed"
        for before in range(known, step):
            self._take(before, lookup)
        return self._take(step, lookup)

    def cursor(self, step: int, lookup: Lookup) -> Cursor:
        """Where a step begins."""
        if step not in self.cursors:
            self.sequences(step - 1, lookup)
        return self.cursors[step]

    def _take(self, step: int, lookup: Lookup) -> tuple[Column, Column]:
        begins = self.cursors[step]
        for _ in range(self.skips.before(step), self.skips.batch(step)):
            _, begins = self._batch(begins, lookup)
        taken, self.cursors[step + 1] = self._batch(begins, lookup)
        self.cursors.pop(step - KEPT, None)
        return taken

    def _batch(self, begins: Cursor, lookup: Lookup) -> tuple[tuple[Column, Column], Cursor]:
        """The batch that begins there, as sequences() gives it, and where the next one begins."""
        (window, at), need = begins, self.size
        ids, numbers = list[Column](), list[Column]()
        while need:
            found, sequence = self._window(window, lookup)
            count = int(sequence[-1]) + 1
            some = min(need, count - at)
            here = slice(*np.searchsorted(sequence, [at, at + some]))
            ids.append(found[here])
            numbers.append(sequence[here] - at + self.size - need)
            need, at = need - some, at + some
            if at == count:
                window, at = window + 1, 0
        return (np.concatenate(ids), np.concatenate(numbers)), Cursor(window, at)

    def _window(self, window: int, lookup: Lookup) -> tuple[Column, Column]:
        """The samples of a window in order of their sequences, and those; kept while steps need it."""
        assert self.windows is not None
        if window not in self._packed:
            capacity, positions, skipped = self.windows
            end, first = self.stream.blend.end, window * positions
            stop = first + positions if end is None else min(first + positions, max(end, first + 1))
            ids = self._ids(np.arange(first, stop), skipped)
            key = window_key(self.stream.seed, window)
            sequence = pack(lookup(ids).length, capacity, key)
            order = np.argsort(sequence, kind="stable")
            self._packed[window] = ids[order], sequence[order]
            for old in [w for w in self._packed if w < window - 1]:
                del self._packed[old]
        return self._packed[window]


@lru_cache(maxsize=2)
def _ascending(ids: frozenset[int]) -> Column:
    """Sorted once, however many steps are planned with them."""
    return np.sort(np.fromiter(ids, dtype=np.int64, count=len(ids)))


def first_plan(cfg: Config, inputs: PlanInputs, index: Index) -> StepPlan:
    """The plan of step 0; looks at the samples alone that it must."""

    def lookup(ids: Column) -> SampleTable:
        return SampleTable.of([index.samples[i] for i in ids.tolist()], inputs)

    return Batches.of(cfg, index).plan(0, lookup, inputs, index.skipped.keys())
