"""Step plans and their tensors, prepared ahead in a background thread.

Prefetching finds unreadable samples. Other ranks cannot derive these, so each step begins with one small
message between all ranks: the unreadable samples and a fingerprint of the plan (Control.agree).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from mm.data.order import sample_ids
from mm.data.reader import BadSample
from mm.data.sample import Index, Sample
from mm.errors import DataError
from mm.plan.step_plan import StepPlan, plan_step
from mm.ranks.batch import Assembler, RankMicrobatch
from mm.ranks.control import Control

MAX_BAD_IN_A_ROW = 100


@dataclass(frozen=True)
class FeedOptions:
    """Which samples a step takes, and how far ahead steps are prepared."""

    seed: int  # of the samples' order
    global_batch: int  # samples a step, over all ranks
    prefetch: int  # steps prepared ahead; at least 1


@dataclass(frozen=True)
class Prepared:
    """A step that is ready to run on this rank, unless `bad` has samples: `micro` is incomplete then."""

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
    """Training steps in order.

    bad: ids of samples that are known to be unreadable or left out by config, equal on all ranks; it grows.
    """

    def __init__(
        self,
        index: Index,
        assembler: Assembler,
        control: Control,
        options: FeedOptions,
        *,
        bad: Collection[int] = (),
        warn: Callable[[str], None] = print,
    ) -> None:
        self.bad = frozenset(bad) | frozenset(index.skipped)
        self.index, self._assembler, self._control = index, assembler, control
        self._options, self._warn = options, warn
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._pending: dict[int, Future[Prepared]] = {}

    def next(self, step: int, stop: int) -> tuple[Prepared, float]:
        """Step number `step` and the seconds spent waiting for it. Steps from `stop` on are not prefetched.

        Raises DataError after MAX_BAD_IN_A_ROW unreadable samples without a good step between them.
        """
        start, in_a_row = time.perf_counter(), 0
        while True:
            for s in range(step, min(step + max(1, self._options.prefetch) + 1, stop)):
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
        samples, options = self.index.samples, self._options
        ids = sample_ids(options.seed, step, options.global_batch, len(samples), known_bad)
        return prepare(step, [samples[i] for i in ids], self._assembler)

    def close(self) -> None:
        """Stop the thread and drop what it was preparing."""
        self._drop_pending()
        self._pool.shutdown(wait=True)
