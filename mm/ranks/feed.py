"""Step plans and their tensors, prepared ahead in a background thread.

Unreadable samples are found while prefetching. They are the one thing that ranks must tell each other: one
small message a step carries them, together with a fingerprint of the plan, before the step is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mm.data.index import Index, Sample
from mm.data.order import sample_ids
from mm.data.reader import BadSample
from mm.errors import DataError
from mm.plan.step_plan import StepPlan, plan_step
from mm.ranks.batch import Assembler, RankMicrobatch
from mm.ranks.control import Control

MAX_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class Prepared:
    """A step ready to run on this rank; micro is incomplete where a sample was unreadable."""

    plan: StepPlan
    micro: tuple[RankMicrobatch, ...]
    bad: tuple[BadSample, ...]


def prepare(step: int, samples: Sequence[Sample], assembler: Assembler) -> Prepared:
    """Plan a step over `samples` and read this rank's part of it."""
    plan = plan_step(step, samples, assembler.inputs)
    bad: list[BadSample] = []
    micro = [assembler.build(mb, plan.counts, bad) for mb in plan.microbatches]
    return Prepared(plan, tuple(m for m in micro if m is not None), tuple(bad))


class Feed:
    """Training steps in order. `bad` is the set of samples known so far to be unreadable, or left out by
    config, equal on all ranks."""

    def __init__(
        self,
        index: Index,
        assembler: Assembler,
        control: Control,
        *,
        seed: int,
        global_batch: int,
        ahead: int,
        bad: Collection[int] = (),
        warn: Callable[[str], None] = print,
    ) -> None:
        self.bad = frozenset(bad) | frozenset(index.skipped)
        self.index, self._assembler, self._control = index, assembler, control
        self._seed, self._global_batch, self._ahead = seed, global_batch, max(1, ahead)
        self._warn = warn
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._pending: dict[int, Future[Prepared]] = {}

    def next(self, step: int, stop: int) -> tuple[Prepared, float]:
        """Step number `step` and the seconds spent waiting for it; nothing from `stop` on is prefetched.

        Raises DataError after 100 unreadable samples without a good step between them.
        """
        start, in_a_row = time.perf_counter(), 0
        while True:
            for s in range(step, min(step + self._ahead + 1, stop)):
                if s not in self._pending:
                    self._pending[s] = self._pool.submit(self._prepare, s, self.bad)
            prepared = self._pending.pop(step).result()
            found = self._control.agree(prepared.plan, [b.sample_id for b in prepared.bad])
            if not found:
                return prepared, time.perf_counter() - start
            for error in prepared.bad:
                self._warn(f"skipped and replaced: {error}")
            in_a_row += len(found)
            if in_a_row >= MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{in_a_row} unreadable samples in a row at step {step + 1}; check the shards "
                    f"({prepared.bad[0] if prepared.bad else 'read by another rank'})"
                )
            self.bad |= found
            self._drop_pending()

    def _drop_pending(self) -> None:
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def _prepare(self, step: int, known_bad: frozenset[int]) -> Prepared:
        samples = self.index.samples
        ids = sample_ids(self._seed, step, self._global_batch, len(samples), known_bad)
        return prepare(step, [samples[i] for i in ids], self._assembler)

    def close(self) -> None:
        """Stop the thread; what it was preparing is dropped."""
        self._drop_pending()
        self._pool.shutdown(wait=True)
