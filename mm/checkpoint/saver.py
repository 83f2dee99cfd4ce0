"""Checkpoints of a job that trains on while they are written.

Training stops for a copy of this rank's share to memory that a writer has (writer.py), which looks whether it
is finite and writes it. How far the writers are goes with the message at the end of each step, so all ranks
learn that they are done, or of an error, at the same step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.kept import rule_of
from mm.checkpoint.remote.copier import Copier
from mm.checkpoint.remote.note import with_copied
from mm.checkpoint.state import EMPTY, Given, buffers, contents, state_tensors
from mm.checkpoint.sums import keep_sums
from mm.checkpoint.writer import Status, Writer
from mm.data.sample import Index
from mm.errors import CheckpointError, NonFinite
from mm.plan.blueprint import Blueprint
from mm.plan.drawn import NOTHING, Drawn
from mm.ranks.job import Job
from parallel import checkpoint as store
from parallel.sharding.param import local

LONGEST_S = 1.0  # between two looks at the writers, while a job waits for them
GRACE_S = 5.0  # that a writer has to end when its job fails


class Saver:
    """Writes the checkpoints of a run; every rank makes one, and makes the same calls.

    It is best made before the job: its process begins with what the rank has in memory then.

    warn: hears of a checkpoint that could not be written, where the run goes on (checkpoint.on_failure).
    step: of the last checkpoint that is there as far as this has written one, else None.
    seconds: that training has stood still for the last save.
    """

    def __init__(self, blueprint: Blueprint, index: Index, directory: Path, rank: int) -> None:
        self._cfg, self._directory = blueprint.cfg, directory
        self.warn: Callable[[str], object] = lambda text: None
        describe, rules = partial(contents, blueprint, index), self._cfg.checkpoint
        stay = with_copied(rule_of(rules), directory)
        also = partial(keep_sums, directory, index)
        self._writer = Writer(directory, rank, describe, stay, also, self._cfg.run.timeout_s)
        self._copier = Copier(directory, rules) if rank == 0 and rules.remote.url is not None else None
        self.step: int | None = None
        self.seconds = 0.0
        self._under_way: int | None = None  # the step whose checkpoint is being written
        self._prepared = False
        self._names: list[str] = []  # of this rank's share; a rank that no module names has none
        self._items: list[Tensor] = []
        self._staged: list[Tensor] = []

    def copy_to(self, run: str, first: int, info: Callable[[str], object]) -> None:
        """Copy checkpoints to checkpoint.remote from now on, where there is one. run: own_target() of it.
        first: step after which the run goes on. info: hears of how copies go, beside `warn`."""
        if self._copier is not None:
            self._copier.info, self._copier.warn = info, self.warn
            self._copier.begin(run, first)

    def prepare(self, job: Job) -> None:
        """Plan who writes what, and make the memory for it; does nothing the second time. Called after the
        first step, which averages of weights begin with."""
        if self._prepared:
            return
        problem = ""
        if job.rank.rank == 0:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                store.remove_leftovers(self._directory)
            except OSError as error:
                problem = str(error)
        problem = job.control.tell(problem)[0]
        if problem:
            raise CheckpointError(f"no checkpoint can be written to {self._directory}: {problem}")
        share, self._items = store.plan_share(state_tensors(job))
        self._names, self._prepared = share.names, True
        self._staged = self._writer.prepare(share, self._items, buffers(job).keys())
        if job.rank.device.type == "cuda":
            pin(self._staged)

    def start(
        self,
        job: Job,
        step: int,
        bad: Collection[int],
        drawn: Drawn = NOTHING,
        metrics: Mapping[str, float] = EMPTY,
        guard: Mapping[str, Any] = EMPTY,
    ) -> None:
        """Save the state after `step` steps; returns once it is copied. Waits for the save before, if any.

        bad: samples known to be unreadable. drawn: what the steps have taken. metrics: of this step, by which
        checkpoints may be kept. guard: the numbers that are watched (mm.train.guard). Raises as hear() does.
        """
        begun = time.perf_counter()
        self.wait(job)
        self.prepare(job)
        if self._names:
            self._copy(job)
        self._writer.begin(Given(step, frozenset(bad), drawn, dict(metrics), dict(guard)))
        self._under_way = step
        self.seconds = time.perf_counter() - begun

    @torch.no_grad()
    def _copy(self, job: Job) -> None:
        """Copy this rank's items as they are now. Parameters and moments are updated in place (the optimizer
        holds them too); buffers are looked up, since a plug-in may put another tensor in one's place."""
        found = buffers(job)
        for n, name in enumerate(self._names):
            if name in found:
                self._items[n] = local(found[name].detach())
        torch._foreach_copy_(self._staged, self._items, non_blocking=True)
        if job.rank.device.type == "cuda":
            torch.cuda.current_stream(job.rank.device).synchronize()

    def status(self) -> float:
        """What this rank's writer is doing, for hear()."""
        return float(Status.IDLE if self._under_way is None else self._writer.poll())

    def hear(self, job: Job, most: float, *, last: bool = False) -> bool:
        """Whether nothing is being written any more. most: the largest status() of all ranks.

        Where some weight is not finite this raises NonFinite on all ranks, and nothing was published. Where
        some rank could not write it raises CheckpointError on all of them, or tells `warn`, as
        checkpoint.on_failure says. last: there is nothing to go on with, so it raises in any case.
        """
        if self._copier is not None:
            self._copier.hear()
        if self._under_way is not None and most != Status.WRITING:
            step, self._under_way = self._under_way, None
            if most != Status.IDLE:
                self._give_up(job, step, Status(int(most)), last)
            else:
                self.step = step
                if self._copier is not None:
                    self._copier.wake()
        return self._under_way is None

    def check(self, job: Job, *, last: bool = False) -> bool:
        """hear() what all ranks say in a message of its own, where something is being written."""
        if self._under_way is None:
            return True
        return self.hear(job, float(job.control.gather([self.status()]).max()), last=last)

    def wait(self, job: Job, *, last: bool = False) -> None:
        """check() until nothing is being written."""
        pause = 0.002
        while not self.check(job, last=last):
            self._writer.poll(pause)
            pause = min(2 * pause, LONGEST_S)

    def wait_for_copies(self, job: Job) -> None:
        """Wait until all is copied to checkpoint.remote, or its wait_s is over; every rank calls this."""
        begun = time.monotonic()
        while job.control.any(not (self._copier is None or self._copier.last(begun))):
            pass

    def _give_up(self, job: Job, step: int, most: Status, last: bool) -> None:
        """Remove what there is of a checkpoint that some rank cannot or may not write; say why on all."""
        why = self._writer.why if self._writer.status is most else ""
        self._writer.cancel()
        said = job.control.tell(why)  # after it no rank writes any more
        if job.rank.rank == 0:
            shutil.rmtree(store.partial_of(self._directory, step), ignore_errors=True)
        if most is Status.NOT_FINITE:
            found = "; ".join(f"{text} on rank {rank}" for rank, text in enumerate(said) if text)
            raise NonFinite(
                f"after step {step} weights or optimizer state are not finite: {found}. No checkpoint of "
                "them was published, and those before it are kept; a resume goes on from the newest. Lower "
                "train.lr, or leave out the batches that lead here (data.skip)"
            )
        reasons = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)
        text = (
            f"the checkpoint of step {step} cannot be written to {self._directory}: {reasons}; those before "
            "it are whole"
        )
        if last or self._cfg.checkpoint.on_failure == "end":
            raise CheckpointError(text)
        if job.rank.rank == 0:
            self.warn(f"{text}; training goes on (checkpoint.on_failure)")

    def close(self) -> None:
        """End the process. What it is writing has GRACE_S to come to its end, where its job has failed."""
        if self._under_way is not None:
            self._writer.poll(GRACE_S)
        self._writer.close()
        if self._copier is not None:
            self._copier.close()


def pin(tensors: Sequence[Tensor]) -> None:
    """Lock the memory of tensors that lie in one block, so that a device copies to it at full speed."""
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return
    first = min(t.data_ptr() for t in filled)
    size = max(t.data_ptr() + t.nbytes for t in filled) - first
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types here
    cudart.cudaHostRegister(first, size, 0)


def save(
    job: Job, index: Index, directory: Path, step: int, bad: Collection[int], drawn: Drawn = NOTHING
) -> Path:
    """Write the state after `step` steps and wait for it; every rank calls this. Returns its path."""
    with closing(Saver(job.blueprint, index, directory, job.rank.rank)) as saver:
        saver.start(job, step, bad, drawn)
        saver.wait(job, last=True)
    return store.final_of(directory, step)
