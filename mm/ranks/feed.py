"""Step plans and their tensors, prepared ahead: planned in a process, read in a background thread.

Prefetching finds unreadable samples. Other ranks cannot derive these, so all ranks tell each other before a
step runs: the unreadable samples and a fingerprint of the plan. That goes with the message at the end of the
step before, or with one of its own where some rank has not prepared the step by then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple

import numpy as np

from mm.data.reader import BadSample
from mm.data.sample import Index, Sample
from mm.errors import DataError
from mm.plan.batches import AHEAD, Batches
from mm.plan.drawn import NOTHING, Drawn
from mm.plan.schedules import Schedules
from mm.plan.step_plan import StepPlan, plan_step
from mm.plan.table import DataTable
from mm.ranks.batch import Assembler, RankMicrobatch
from mm.ranks.control import Control, notice
from mm.ranks.decoding import Decoded, Reads, Task
from mm.ranks.planner import Planned, Planner
from mm.ranks.skipped import Listener, Tally, merged, written
from mm.ranks.workers import Ticket, Workers


@dataclass(frozen=True)
class FeedOptions:
    """Which samples a step takes, and how far ahead steps are prepared."""

    batches: Batches
    prefetch: int  # steps prepared ahead; at least 1
    drawn: Drawn = NOTHING  # before the first of them
    workers: int = 0  # processes that read and decode for this rank; 0: its feed thread does
    item_timeout_s: float = 30.0  # longest time that a worker may take for one item, or for one text
    max_skipped: float = 1.0  # largest share of unreadable samples (Tally)


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to run on this rank, unless `bad` has samples: `micro` is incomplete then."""

    plan: StepPlan
    micro: tuple[RankMicrobatch, ...]
    bad: tuple[BadSample, ...]


def prepare(step: int, samples: Sequence[Sample], assembler: Assembler) -> Prepared:
    """Plan a step over `samples` and read this rank's part of it."""
    return read_step(plan_step(step, samples, assembler.inputs), assembler)


def read_step(plan: StepPlan, assembler: Assembler) -> Prepared:
    """Read this rank's part of a planned step."""
    return _built(Planned(plan, assembler.boundary(plan)), repeat(None), assembler)


def _built(planned: Planned, found: Iterable[Reads[Decoded] | None], assembler: Assembler) -> Prepared:
    """This rank's part of a planned step. found: by micro-batch, what has been read; None: it is read now."""
    bad: list[BadSample] = []
    plan = planned.plan
    micro = [
        assembler.build(mb, plan.counts, bad, boundary, own)
        for mb, boundary, own in zip(plan.microbatches, planned.boundary, found, strict=False)
    ]
    return Prepared(plan, tuple(m for m in micro if m is not None), tuple(bad))


class _Begun(NamedTuple):
    """A step that is planned, and whose tasks are with the workers."""

    known_bad: frozenset[int]
    planned: Planned
    reads: Sequence[Reads[Task]]
    ticket: Ticket


class Feed:
    """Training steps in order.

    bad: ids of samples that are known to be unreadable or left out by config, equal on all ranks; it grows.
    schedules: where the schedules of steps are kept; None where nobody asks for them. listener: None prints
    warnings.
    """

    def __init__(
        self,
        index: Index,
        assembler: Assembler,
        control: Control,
        options: FeedOptions,
        *,
        schedules: Schedules | None = None,
        bad: Collection[int] = (),
        listener: Listener | None = None,
    ) -> None:
        self.bad = frozenset(bad) | frozenset(index.skipped)
        self.index, self._assembler, self._control = index, assembler, control
        self._options, self._schedules = options, schedules
        self._listener, self._tally = listener or Listener(), Tally(options.max_skipped)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._pending: dict[int, Future[Prepared]] = {}
        self._planner: Planner | None = None
        self._workers: Workers | None = None
        self._begun: dict[int, _Begun] = {}  # by step; of the feed thread
        self.skips = options.batches.skips
        self.drawn = options.drawn  # up to the step that next() gave last
        self._heard: tuple[int, np.ndarray] | None = None  # a step, and what all ranks say of it

    @property
    def patience_s(self) -> float:
        """Seconds that a step may take to be read on top of a wait for another rank."""
        return self._options.item_timeout_s + self._assembler.reader.patience_s

    def notice(self, step: int) -> list[float]:
        """What this rank tells the others of a step that is to come, with a message that goes anyway."""
        future = self._pending.get(step)
        if future is None or not future.done() or future.exception() is not None:
            return notice(None, ())
        prepared = future.result()
        return notice(prepared.plan, [b.sample_id for b in prepared.bad])

    def hear(self, step: int, notices: np.ndarray) -> None:
        """Take note of what all ranks say of a step: [world, NOTICE], equal on all ranks."""
        ready = notices[:, 0].all()
        self._heard = (step, notices) if ready else None

    def next(self, step: int, stop: int) -> tuple[Prepared, float]:
        """Step number `step` and the seconds spent waiting for it. Steps from `stop` on are not prefetched.

        Raises DataError where too many samples are unreadable (Tally).
        """
        start = time.perf_counter()
        if self._planner is None:
            self._planner = self._start_planner()
            assembler, options = self._assembler, self._options
            self._workers = Workers(
                assembler.decode, options.workers, assembler.rank, self.patience_s, assembler.ahead
            )
        while True:
            last = min(step + max(1, self._options.prefetch) + 1, stop)
            for s in range(step, last):
                if s not in self._pending:
                    self._pending[s] = self._pool.submit(self._prepare, s, self.bad, stop)
            prepared = self._pending.pop(step).result()
            self._say_notes()
            found = self._agreed(step, prepared)
            if not found:
                self.drawn = self.drawn.after(prepared.plan, self.skips)
                self._tally.count(prepared.plan.sample_ids, ())
                self._tally.done()
                return prepared, time.perf_counter() - start
            self.bad |= self._left_out(step, prepared)
            self._drop_pending()

    def _left_out(self, step: int, prepared: Prepared) -> frozenset[int]:
        """The samples of a step that some rank cannot read, which all ranks name and count alike."""
        skips = merged(self._control.tell(written(prepared.bad)))
        ids = frozenset(s.sample_id for s in skips)
        if self._assembler.rank == 0:
            for one in skips:
                self._listener.warn(f"skipped and replaced: {one}")
        self._listener.skip(step + 1, skips)
        why = self._tally.count(prepared.plan.sample_ids, ids)
        if why is not None:
            raise DataError(f"{why}, at step {step + 1}; check the shards ({skips[-1]})")
        return ids

    def _agreed(self, step: int, prepared: Prepared) -> frozenset[int]:
        """The samples of a step that some rank cannot read, by what ranks have said already or by asking."""
        heard, self._heard = self._heard, None
        if heard is not None and heard[0] == step:
            return self._control.compare(prepared.plan, heard[1])
        return self._control.agree(prepared.plan, [b.sample_id for b in prepared.bad])

    def _drop_pending(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def _start_planner(self) -> Planner:
        """The planner is forked here, by the thread that trains and before there is another."""
        assembler, schedules = self._assembler, self._schedules
        table, batches = (
            DataTable.of(self.index, assembler.inputs),
            replace(self._options.batches, ahead=AHEAD),
        )

        def plan(step: int, known_bad: frozenset[int]) -> Planned:
            made = batches.plan(step, table.take, assembler.inputs, known_bad)
            schedule = None if schedules is None else schedules.new(made.active)
            return Planned(made, assembler.boundary(made), schedule)

        return Planner(plan, table, assembler.inputs, assembler.rank)

    def _prepare(self, step: int, known_bad: frozenset[int], stop: int) -> Prepared:
        """In the feed thread. Workers get the tasks of the step after before this one is put together: they
        need not wait for that."""
        assert self._workers is not None
        for s in [s for s, begun in self._begun.items() if begun.known_bad is not known_bad or s < step]:
            self._workers.forget(self._begun.pop(s).ticket)
        for s in range(step, min(step + 1 + bool(self._options.workers), stop)):
            if s not in self._begun:
                self._begun[s] = self._begin(s, known_bad, stop)
        begun = self._begun.pop(step)
        given = iter(self._workers.results(begun.ticket))
        return _built(begun.planned, [own.filled(given) for own in begun.reads], self._assembler)

    def _begin(self, step: int, known_bad: frozenset[int], stop: int) -> _Begun:
        assert self._workers is not None
        planned = self._planned(step, known_bad, stop)
        reads = [self._assembler.needs(mb) for mb in planned.plan.microbatches]
        tasks = [task for own in reads for task in own.every]
        empty = self._workers.empty
        places = [place for own in reads for place in self._assembler.places(own, empty)]
        ticket = self._workers.submit(tasks, places)
        return _Begun(known_bad, planned, reads, ticket)

    def _planned(self, step: int, known_bad: frozenset[int], stop: int) -> Planned:
        """The plan of a step. The one after it is planned while this one is read."""
        assert self._planner is not None
        if self._planner.asked not in (None, (step, known_bad)):
            with contextlib.suppress(DataError):  # of a plan that nobody needs any more
                self._answer(self._planner)
        if self._planner.asked is None:
            self._planner.ask(step, known_bad)
        planned = self._answer(self._planner)
        if step + 1 < stop:
            self._planner.ask(step + 1, known_bad)
        return planned

    def _answer(self, planner: Planner) -> Planned:
        planned = planner.answer()
        # The planner sends a schedule once, so that of a plan which is not needed is kept too.
        if planned.schedule is not None and self._schedules is not None:
            self._schedules.add(planned.schedule)
        return planned

    def _say_notes(self) -> None:
        """Say what has happened to workers; in the thread that trains."""
        for note in self._workers.notes() if self._workers is not None else ():
            self._listener.warn(note)

    def close(self) -> None:
        """Stop the thread, the workers and the planner, and drop what they were preparing."""
        self._drop_pending()
        if self._workers is not None:
            self._workers.stop()
        self._pool.shutdown(wait=True)
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self._planner is not None:
            self._planner.close()
            self._planner = None
