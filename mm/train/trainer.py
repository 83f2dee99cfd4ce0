"""The training job of one rank, from config to final table."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from mm.checkpoint.newest import load_newest
from mm.checkpoint.remote.start import own_target
from mm.checkpoint.resume import begin, last_of
from mm.checkpoint.room import writing_to
from mm.checkpoint.saver import Saver
from mm.checkpoint.weights import fill_adapters, fill_encoders, left_by, start_from
from mm.config.schema import resolve_yaml
from mm.data.sample import Index
from mm.data.tokenizer import make_tokenizer
from mm.data.tokenizer_files import keep_tokenizer
from mm.errors import of_stage
from mm.faults.heartbeat import Heartbeat, Place
from mm.plan.blueprint import Blueprint
from mm.ranks.agree import check_same_data, claimed_by_one, facts_of
from mm.ranks.job import Job, build_job, open_data, open_indexes
from mm.ranks.launch import RankInfo, come, join, restarted
from mm.ranks.rendezvous import at, connect
from mm.ranks.stop import Stop
from mm.report.header import header, memory_warning
from mm.report.plan_json import plan_json
from mm.report.starts import write_start
from mm.train.boards import open_boards
from mm.train.console import Console
from mm.train.garbage import set_aside
from mm.train.loop import Loop
from mm.train.one_step import AT_START
from parallel.checkpoint import Held, step_of, write_whole


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
    facts, cfg = facts_of([(r.name, r.blueprint) for r in runs]), runs[0].blueprint.cfg
    folders = [Path(run.blueprint.cfg.run.dir) for run in runs]
    rank = come(cfg)
    with _heartbeat(runs[0], rank, last) as heartbeat:
        try:
            with heartbeat.telling():
                rank = join(rank, cfg, facts)
                with claimed_by_one(folders, rank):
                    _train_in_turn(runs, rank, stop, heartbeat)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _heartbeat(run: Run, rank: RankInfo, last: Callable[[], object]) -> Heartbeat:
    lead_here = os.environ.get("LOCAL_RANK", "0") == "0"
    place = Place(rank.rank, rank.world, lead_here, rank.timeout_s, at(), rank.agent)
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
    first, remote = state.step, cfg.checkpoint.remote.url is not None and saver is not None
    run = own_target(cfg, run_dir, rank, resume) if remote else ""
    aside = begin(run_dir, rank, resume, first)
    with writing_to(run_dir):
        console = Console(run_dir, cfg.train.steps, first=first, lead=rank.rank == 0)
        if rank.rank == 0:
            console.boards += open_boards(cfg, run_dir, first)
            _write_once(blueprint, rank, train_data.index, first)
    console.note(about)
    if aside:
        console.info(f"checkpoints that this run does not follow: {', '.join(p.name for p in aside)}")
    for line in said:
        console.info(line)
    console.left_out(train_data.index)
    if eval_data is not None:
        console.left_out(eval_data.index, evaluation=True)
    if saver is not None:
        saver.warn = console.warn
        saver.copy_to(run, first, console.info)
    loop = Loop(job, (train_data, eval_data), console, saver, stop, state=state)
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


def _write_once(blueprint: Blueprint, rank: RankInfo, index: Index, first: int) -> None:
    """Write what a run's folder says of this start. Files that are there stay where that fails."""
    run_dir = Path(blueprint.cfg.run.dir)
    write_whole(run_dir / "config.yaml", resolve_yaml(blueprint.cfg))
    write_whole(run_dir / "plan.json", plan_json(blueprint, index))
    keep_tokenizer(make_tokenizer(blueprint.cfg.data.tokenizer), run_dir)
    write_start(run_dir, rank, dist.get_backend(), first)


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
