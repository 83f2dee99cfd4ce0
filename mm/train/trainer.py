"""The training job of one rank, from config to final table."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from mm.checkpoint.newest import load_newest
from mm.checkpoint.resume import begin, last_of
from mm.checkpoint.saver import Saver
from mm.checkpoint.state import Resumed
from mm.checkpoint.weights import fill_adapters, fill_encoders, left_by, start_from
from mm.config.outline import SINK
from mm.config.schema import resolve_yaml
from mm.data.sample import Index, Sample
from mm.data.tokenizer import make_tokenizer
from mm.data.tokenizer_files import keep_tokenizer
from mm.errors import NonFinite, of_stage
from mm.faults.heartbeat import Heartbeat, Place
from mm.order.skips import Skips, Span
from mm.plan.batches import Batches
from mm.plan.blueprint import Blueprint
from mm.plan.flops import step_flops
from mm.plan.step_plan import Imbalance, StepPlan
from mm.ranks.agree import check_same_data, claimed_by_one, facts_of
from mm.ranks.feed import Feed, FeedOptions
from mm.ranks.job import Data, Job, build_job, open_data, open_indexes
from mm.ranks.launch import RankInfo, init_distributed, restarted
from mm.ranks.rendezvous import connect
from mm.ranks.skipped import Listener
from mm.ranks.stop import Stop, StopRequested
from mm.report.header import header, memory_warning
from mm.report.plan_json import plan_json
from mm.report.starts import write_start
from mm.report.timeline import draw_measured
from mm.train.boards import open_boards
from mm.train.console import Console
from mm.train.evaluate import Evaluation, blind_guess, evaluate
from mm.train.garbage import set_aside
from mm.train.guard import Guard
from mm.train.metrics import StepMetrics, TimedStep
from mm.train.replicas import check_replicas
from mm.train.statistics import Watch
from mm.train.step import run_step
from mm.train.update import finish_step, learning_rate
from mm.train.weights import averaged
from parallel.checkpoint import Held, step_of
from parallel.schedule import Record

AT_START = Resumed()


class Run(NamedTuple):
    """blueprint: of a run, or of one stage of it. name: of the stage, "" without stages. before: folders of
    the stages before it."""

    blueprint: Blueprint
    name: str = ""
    before: Sequence[Path] = ()


def train(runs: Sequence[Run], stop: Stop, last: Callable[[], object] = lambda: None) -> None:
    """Train on this rank, a run after the other, until done, or until `stop` is asked.

    Stages that are done are passed over. last: what to do before a rank is ended whose main thread hangs.
    Raises Told where a run cannot go on, once some rank has told why.
    """
    rank = init_distributed(runs[0].blueprint.cfg, facts_of([(r.name, r.blueprint) for r in runs]))
    folders = [Path(run.blueprint.cfg.run.dir) for run in runs]
    with _heartbeat(runs[0], rank, last) as heartbeat:
        try:
            with heartbeat.telling(), claimed_by_one(folders, rank):
                _train_in_turn(runs, rank, stop, heartbeat)
        finally:
            dist.destroy_process_group()


def _heartbeat(run: Run, rank: RankInfo, last: Callable[[], object]) -> Heartbeat:
    place = Place(rank.rank, rank.world, os.environ.get("LOCAL_RANK", "0") == "0", rank.timeout_s)
    folder = Path(run.blueprint.cfg.run.dir)
    return Heartbeat(place, partial(connect, rank.timeout_s), rank.record, folder, last)


def _train_in_turn(runs: Sequence[Run], rank: RankInfo, stop: Stop, heartbeat: Heartbeat) -> None:
    left = [run for run in runs if not (run.name and _done(run, rank))]
    for run in left[1:]:
        with of_stage(run.name):
            open_indexes(run.blueprint)  # a later stage's data is refused now, not when its turn comes
    before: Held | None = None
    for run in left:
        heartbeat.run_dir = Path(run.blueprint.cfg.run.dir)
        before = train_on(_started(run, rank), rank, stop, before)
        if before is None:
            return
        gc.collect()  # modules hold process groups in reference cycles


def _done(run: Run, rank: RankInfo) -> bool:
    """Whether a stage has its last checkpoint."""
    cfg = run.blueprint.cfg
    if cfg.checkpoint.resume == "none" and not restarted():
        return False
    last = last_of(Path(cfg.run.dir), rank)
    done = last is not None and step_of(last) == cfg.train.steps
    if rank.rank == 0:
        print(f"stage {run.name}: {f'done, {last}' if done else f'{cfg.train.steps} steps'}", flush=True)
    return done


def _started(run: Run, rank: RankInfo) -> Blueprint:
    """The blueprint of a stage that starts from what the stages before it have left, the latest first."""
    cfg = run.blueprint.cfg
    left = [str(path) for folder in reversed(run.before) if (path := last_of(folder, rank)) is not None]
    if not left:
        return run.blueprint
    starts = cfg.checkpoint.model_copy(update={"weights": [*left, *cfg.checkpoint.starts]})
    return replace(run.blueprint, cfg=cfg.model_copy(update={"checkpoint": starts}))


def train_on(blueprint: Blueprint, rank: RankInfo, stop: Stop, before: Held | None = None) -> Held | None:
    """Train in a default process group that is initialised already.

    before: what this gave of the stage before, where these processes ran it. Returns the weights on this rank
    once all steps are done, else None.
    """
    indexes = open_indexes(blueprint)
    check_same_data(rank, blueprint, indexes)
    about = _introduce(blueprint, rank, indexes)
    if not blueprint.cfg.checkpoint.every:
        return _train_on(blueprint, rank, stop, before, (indexes, about), None)
    # Made before the job takes memory, with which the process that writes would begin.
    with closing(Saver(blueprint, indexes["training"], Path(blueprint.cfg.run.dir), rank.rank)) as saver:
        return _train_on(blueprint, rank, stop, before, (indexes, about), saver)


def _train_on(
    blueprint: Blueprint,
    rank: RankInfo,
    stop: Stop,
    before: Held | None,
    known: tuple[Mapping[str, Index], str],
    saver: Saver | None,
) -> Held | None:
    """train_on() with what is known before there is a job: the indexes, and the header."""
    cfg, (indexes, about) = blueprint.cfg, known
    job = build_job(blueprint, rank)
    data = {name: open_data(job, index) for name, index in indexes.items()}
    train_data, eval_data = data["training"], data.get("evaluation")
    run_dir = Path(cfg.run.dir)
    state, said = AT_START, list[str]()
    resume, found = load_newest(job, train_data.index, run_dir)
    if found is not None:
        state = found
        said += [f"resumed from {resume} at step {state.step}", *state.changed]
    else:
        said += _start(job, before)
    if before is not None:
        before.free()
    first = state.step
    aside = begin(run_dir, rank, resume, first)
    console = Console(run_dir, cfg.train.steps, first=first, lead=rank.rank == 0)
    if rank.rank == 0:
        console.boards += open_boards(cfg, run_dir, first)
        write_start(run_dir, rank, dist.get_backend(), first)
        (run_dir / "config.yaml").write_text(resolve_yaml(cfg))
        keep_tokenizer(make_tokenizer(cfg.data.tokenizer), run_dir)
        (run_dir / "plan.json").write_text(plan_json(blueprint, train_data.index))
        console.note(about)
    if aside:
        console.info(f"checkpoints that this run does not follow: {', '.join(p.name for p in aside)}")
    for line in said:
        console.info(line)
    console.left_out(train_data.index)
    if saver is not None:
        saver.warn = console.warn
    loop = _Loop(job, (train_data, eval_data), console, saver, stop, state=state)
    rank.record.phase = "training"
    try:
        with set_aside():
            done = loop.run()
    finally:
        loop.close()
        console.close()
    left = left_by(job) if done else None
    job.control.any(False)  # every rank waits here, so that none closes what another still uses
    for opened in data.values():
        opened.assembler.reader.close()
    job.close()
    return left


def _start(job: Job, before: Held | None) -> list[str]:
    """Fill the weights of a job that begins; returns lines on where they came from."""
    start = time.perf_counter()
    fill_adapters(job)  # which those of a checkpoint replace
    came = start_from(job, [Path(path) for path in job.blueprint.cfg.checkpoint.starts], before)
    fill_encoders(job, came)
    seconds = time.perf_counter() - start
    came = {m: came[m] for m in job.blueprint.modules if m in came}
    found = [f"{', '.join(m for m in came if came[m] == w)} {w}" for w in dict.fromkeys(came.values())]
    return [f"weights of {'; of '.join(found)} ({seconds:.2f} s)"] if found else []


def _introduce(blueprint: Blueprint, rank: RankInfo, indexes: Mapping[str, Index]) -> str:
    """Print the header on rank 0, before anything takes memory; returns it ("" on other ranks)."""
    if rank.rank:
        return ""
    about = header(blueprint, indexes, str(rank.device), dist.get_backend())
    print(about, flush=True)
    warning = memory_warning(blueprint, rank.device.type, rank.node_size or rank.world)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return about if warning is None else f"{about}\nwarning: {warning}"


def open_feed(job: Job, data: Data, state: Resumed = AT_START, *, listener: Listener | None = None) -> Feed:
    """The steps of a job over a data set. state: where it resumes."""
    cfg = job.blueprint.cfg
    skips = state.drawn.going_on(state.step, Skips.parse(cfg.data.skip))
    options = FeedOptions(
        Batches.of(cfg, data.index, (state.step, state.drawn.cursor), skips),
        cfg.data.prefetch,
        state.drawn,
        workers=cfg.data.workers,
        item_timeout_s=cfg.data.item_timeout_s,
        max_skipped=cfg.data.max_skipped,
    )
    schedules = job.blueprint.schedules
    return Feed(
        data.index,
        data.assembler,
        job.control,
        options,
        schedules=schedules,
        bad=state.bad_samples,
        listener=listener,
    )


class _Loop:
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
        of the last step, by which checkpoints may be kept."""
        listener = Listener(self.console.warn, self.console.skipped)
        self.feed = open_feed(self.job, self.data, state, listener=listener)
        self.guard = Guard.of(self.job.blueprint.cfg.train, self.feed.skips, state.guard)
        self.done = self.saved = state.step
        self.metrics = dict[str, float]()

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
            self._finish_save()
            lost = self._ends and not self.stop.requested
            why = "files that cannot be written" if lost else "a signal"
            self.console.info(f"stopped by {why} after step {self.done}")
            return False

    def _step(self) -> None:
        """One step, and the checkpoint and evaluation that are due after it. Raises StopRequested."""
        job, cfg = self.job, self.job.blueprint.cfg
        start = time.perf_counter()
        metrics = train_step(job, self.feed, self.done, stop=self._ends, guard=self.guard)
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
            self.saver.check(job)
        every, at_end = cfg.checkpoint.every, self.done == cfg.train.steps
        due = bool(every) and (stopping or self.done % every == 0 or at_end)
        by_evaluation = cfg.checkpoint.keep_best == "eval_loss"
        if due and (stopping or not by_evaluation):
            self._save()
            stopping = stopping or job.control.any(self.stop.requested)  # while it was copied
        if stopping:
            raise StopRequested
        if self.eval_data is not None and cfg.eval.every and self.done % cfg.eval.every == 0 and not at_end:
            result = run_evaluation(job, self.eval_data, self.stop, self.console.warn)
            self.console.evaluation(self.done, result)
            self.metrics["eval_loss"] = result.loss
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
        result = run_evaluation(self.job, self.eval_data, self.stop, self.console.warn)
        self.console.evaluation(self.job.blueprint.cfg.train.steps, result)
        self.metrics["eval_loss"] = result.loss
        if self.job.rank.rank == 0:
            samples = eval_samples(self.job, self.eval_data)
            self.console.lift_table(result, blind_guess(samples, self.eval_data.assembler.encoded))

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


def devices(job: Job) -> int:
    """How many ranks of the job host a module."""
    return len({r for layout in job.blueprint.layouts.values() for r in layout.ranks})


def train_step(
    job: Job, feed: Feed, step: int, *, stop: bool = False, guard: Guard | None = None
) -> StepMetrics:
    """One step: data, forward and backward, update. step counts from 0; stop: this rank was asked to end;
    guard: of the run, None: a step that is not finite raises NonFinite."""
    cfg = job.blueprint.cfg
    record = job.rank.record
    record.step = step + 1
    with record.doing("data", feed.patience_s):
        prepared, waited = feed.next(step, cfg.train.steps)
    records: list[Record] = []
    drawn = cfg.run.trace == step + 1
    every = cfg.train.statistics
    watch = Watch(job) if every and (step + 1) % every == 0 else None
    result = run_step(job, prepared, train=True, observe=records.append if drawn else None, watch=watch)
    if drawn:
        schedule = job.blueprint.schedule(prepared.plan.active)
        draw_measured(schedule, records, job.control, job.rank.rank, Path(cfg.run.dir), step + 1)
    lr = learning_rate(cfg.train, step)
    with record.doing("update", 0.0):
        update = finish_step(job, result, step, lr, stop=stop, notice=feed.notice(step + 1), guard=guard)
    feed.hear(step + 1, update.notices)
    subsets = prepared.plan.subsets
    return StepMetrics(
        step=step + 1,
        loss=update.loss,
        tokens=prepared.plan.tokens,
        lr=lr,
        grad_norm=update.grad_norm,
        grad_norm_by_module=update.grad_norm_by_module,
        flops_by_module=step_flops(job.blueprint, prepared.plan),
        peak_memory_bytes=update.peak_memory_bytes,
        data_s=waited,
        seconds_by_module=update.compute_s,
        waited_s_by_module=update.waited_s,
        slowest_rank=update.slowest,
        optimizer_s=update.optimizer_s,
        boundary=update.boundary,
        objectives=update.objectives,
        loss_by_modality=subsets.losses(update.losses, "modality"),
        loss_by_source=subsets.losses(update.losses, "source"),
        drawn_by_source=feed.drawn.by_source,
        imbalance=load_imbalance(prepared.plan),
        skipped_items=len(feed.bad),
        stop=update.stop,
        layers=update.layers,
        batch=None if feed.skips.batch(step) == step else feed.skips.batch(step) + 1,
        left_out=update.left_out,
    )


def load_imbalance(plan: StepPlan) -> dict[str, Imbalance]:
    """By module, averages over the micro-batches in which it has items, or samples; left out where it never
    has."""
    out = {}
    for module in (*plan.items, SINK):
        found = [i for i in plan.imbalance(None if module == SINK else module) if i is not None]
        if found:
            n = len(found)
            out[module] = Imbalance(sum(i.dealt for i in found) / n, sum(i.by_sample for i in found) / n)
    return out


def run_evaluation(job: Job, data: Data, stop: Stop, warn: Callable[[str], None]) -> Evaluation:
    """Evaluate the first eval.samples held-out samples; StopRequested where a rank was asked to end."""
    cfg = job.blueprint.cfg
    with job.rank.record.doing("evaluation"), averaged(job) if cfg.eval.average else nullcontext():
        return evaluate(job, data, eval_samples(job, data), cfg.run.seed, stop, warn)


def eval_samples(job: Job, data: Data) -> Sequence[Sample]:
    """The first eval.samples held-out samples that are not left out."""
    return data.index.usable[: job.blueprint.cfg.eval.samples]
