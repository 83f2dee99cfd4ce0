"""The steps of a run on one rank, with the checkpoints and evaluations that are due between them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mm.checkpoint.newest import load_newest
from mm.checkpoint.saver import Saver
from mm.checkpoint.state import Resumed
from mm.data.sample import Sample
from mm.errors import NonFinite
from mm.order.skips import Skips, Span
from mm.ranks.job import Data, Job
from mm.ranks.skipped import Listener, Skip
from mm.ranks.stop import AGAIN_S, Stop, StopRequested
from mm.train.console import Console
from mm.train.evaluate import Evaluation, LeaveOut, blind_guess, evaluate
from mm.train.guard import Guard
from mm.train.metrics import TimedStep
from mm.train.one_step import devices, open_feed, train_step
from mm.train.replicas import check_replicas
from mm.train.weights import averaged


class Loop:
    """A run's steps. data: to train on, and to evaluate on, if any. saver: None where no checkpoints are
    asked. state: where the steps begin."""

    def __init__(
        self,
        job: Job,
        data: tuple[Data, Data | None],
        console: Console,
        saver: Saver | None,
        stop: Stop,
        *,
        state: Resumed,
    ) -> None:
        self.job, self.console, self.saver, self.stop = job, console, saver, stop
        self.data, self.eval_data = data
        self.run_dir = Path(job.blueprint.cfg.run.dir)
        self._begin(state)

    def _begin(self, state: Resumed) -> None:
        """Go on from here. done: steps so far; saved: those of the last checkpoint that was begun; metrics:
        of the last step, by which checkpoints may be kept; unreadable: held-out samples that evaluations have
        found."""
        listener = Listener(self.console.warn, self.console.skipped)
        self.feed = open_feed(self.job, self.data, state, listener=listener)
        self.guard = Guard.of(self.job.blueprint.cfg.train, self.feed.skips, state.guard)
        self.done = self.saved = state.step
        self.metrics = dict[str, float]()
        self.unreadable = frozenset[int]()

    def run(self) -> bool:
        """Train and evaluate to the end of the run, or until some rank was asked to end; returns whether it
        came to the end. Its last checkpoint is there then."""
        try:
            if self.job.control.any(self.stop.requested):  # while the run was made ready
                raise StopRequested
            while self.done < self.job.blueprint.cfg.train.steps:
                self._step()
            self._final_evaluation()
            self._finish_save()
            return True
        except StopRequested:
            self._say_how_long()
            self._finish_save()
            lost = self._ends and not self.stop.requested
            why = "files that cannot be written" if lost else "a signal"
            self.console.info(f"stopped by {why} after step {self.done}")
            return False

    def _step(self) -> None:
        """One step, and the checkpoint and evaluation that are due after it. Raises StopRequested."""
        job, cfg = self.job, self.job.blueprint.cfg
        start = time.perf_counter()
        saving = (lambda: 0.0) if self.saver is None else self.saver.status
        metrics = train_step(job, self.feed, self.done, stop=self._ends, guard=self.guard, saving=saving)
        stopping = metrics.stop
        self.console.step(TimedStep(metrics, time.perf_counter() - start, devices(job)))
        self.done += 1
        checked = cfg.train.check_replicas
        if checked and self.done % checked == 0:
            check_replicas(job, self.done)
        jumped = "" if metrics.left_out else self.guard.jumped(metrics.loss)
        if jumped and self._go_back(jumped):
            return
        self.metrics = {"loss": metrics.loss}
        if self.saver is not None:
            self.saver.prepare(job)  # after the first step
            self.saver.hear(job, metrics.saving)
        every, at_end = cfg.checkpoint.every, self.done == cfg.train.steps
        due = bool(every) and (stopping or self.done % every == 0 or at_end)
        by_evaluation = cfg.checkpoint.keep_best == "eval_loss"
        if due and (stopping or not by_evaluation):
            self._save()
            stopping = stopping or job.control.any(self.stop.requested)  # while it was copied
        if stopping:
            raise StopRequested
        if self.eval_data is not None and cfg.eval.every and self.done % cfg.eval.every == 0 and not at_end:
            self._evaluate(self.eval_data)
        if due and by_evaluation and not at_end:
            self._save()

    def _go_back(self, why: str) -> bool:
        """Go on from the newest checkpoint without the batches since. Returns whether there is one; raises
        NonFinite where the run has gone back as often as it may."""
        rule, last = self.guard.train.spike, self.done
        assert rule is not None
        if self.guard.back >= rule.most:
            raise NonFinite(
                f"after step {last} {why}, and the run went back {self.guard.back} times (train.spike.most); "
                "its checkpoints are kept. Lower train.lr, or resume with more batches left out (data.skip)"
            )
        if self.saver is not None:
            self.saver.wait(self.job)  # the newest may be under way
        path, state = load_newest(self.job, self.data.index, self.run_dir, own=True)
        if state is None or path is None:
            self.console.info(f"after step {last} {why}; there is no checkpoint to go back to")
            self.guard.high = 0
            return False
        skips = self.feed.skips
        since = Skips((Span(skips.before(state.step), skips.batch(last - 1)),))
        self.feed.close()
        left_out, again = state.drawn.left_out.with_more(since), self.guard.back + 1
        self._begin(replace(state, drawn=replace(state.drawn, left_out=left_out)))
        self.guard.back = again
        self.console.went_back(state.step, last, why, since.written())
        return True

    def close(self) -> None:
        """Stop what prepares steps."""
        self.feed.close()

    @property
    def _ends(self) -> bool:
        """Whether this rank wants to end after the step."""
        lost = self.console.lost and self.job.blueprint.cfg.run.unwritable == "stop"
        return self.stop.requested or bool(lost)

    def _final_evaluation(self) -> None:
        if self.eval_data is None:
            return
        result = self._evaluate(self.eval_data)
        if self.job.rank.rank == 0:
            samples = eval_samples(self.job, self.eval_data, self.unreadable)
            self.console.lift_table(result, blind_guess(samples, self.eval_data.assembler.encoded))

    def _evaluate(self, data: Data) -> Evaluation:
        """Evaluate now; samples that cannot be read are listed once, and later evaluations begin without."""

        def leave_out(skips: Sequence[Skip]) -> None:
            self.unreadable |= {s.sample_id for s in skips}
            self.console.skipped(self.done, skips, evaluation=True)

        result = run_evaluation(self.job, data, self.stop, self.unreadable, leave_out)
        self.console.evaluation(self.done, result)
        self.metrics["eval_loss"] = result.loss
        return result

    def _say_how_long(self) -> None:
        """Say what the end of a run that was asked to end still waits for."""
        remote = self.job.blueprint.cfg.checkpoint.remote
        if self.saver is not None and remote.url is not None:
            self.console.info(
                f"to end after step {self.done}: the checkpoint is written, then copied for at most "
                f"{remote.wait_s:g} s (checkpoint.remote.wait_s); another signal, {AGAIN_S:g} s after the "
                "first or later, does not wait for that"
            )

    def _save(self) -> None:
        """Begin to save the state as it is."""
        assert self.saver is not None, "checkpoint.every is set"
        given = (self.done, self.feed.bad, self.feed.drawn, self.metrics, self.guard.saved())
        with self.job.rank.record.doing("checkpoint"):
            self.saver.start(self.job, *given)
        self.saved = self.done

    def _finish_save(self) -> None:
        """Have the last step saved, and wait until it is."""
        if self.saver is None:
            return
        if self.saved < self.done:
            self._save()
        self.saver.wait(self.job, last=True)
        remote = self.job.blueprint.cfg.checkpoint.remote
        if remote.url is not None:
            with self.job.rank.record.doing("copies of checkpoints", remote.wait_s):
                self.saver.wait_for_copies(self.job)


def run_evaluation(
    job: Job, data: Data, stop: Stop, unreadable: Collection[int], leave_out: LeaveOut
) -> Evaluation:
    """Evaluate the first eval.samples held-out samples; StopRequested where a rank was asked to end."""
    cfg = job.blueprint.cfg
    with job.rank.record.doing("evaluation"), averaged(job) if cfg.eval.average else nullcontext():
        samples = eval_samples(job, data, unreadable)
        return evaluate(job, data, samples, cfg.run.seed, stop, leave_out)


def eval_samples(job: Job, data: Data, unreadable: Collection[int]) -> Sequence[Sample]:
    """The first eval.samples held-out samples that are not left out, less those known to be unreadable."""
    found: Sequence[Sample] = data.index.usable[: job.blueprint.cfg.eval.samples]
    return [s for s in found if s.id not in unreadable] if unreadable else found
