"""Trains the same model on the same batches under several layouts, in turn, and measures each."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from mm.compare.early import reason
from mm.compare.entry import described, rated, watched
from mm.compare.observe import Observed, observe_memory, observe_step
from mm.compare.result import Comparison, Stopped
from mm.compare.summary import Measured, summarise
from mm.compare.variants import Variant
from mm.compare.verdict import judge
from mm.errors import PolyrankError, Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo, init_distributed
from mm.ranks.memory import reset_peak
from mm.ranks.stop import Stop
from mm.report.host import host_facts
from mm.train.garbage import set_aside
from mm.train.one_step import open_feed, train_step


@dataclass
class Run:
    """One layout of a comparison: its job, and what its rounds have measured so far.

    observed: by round, a watched step. memory: by rank, of the step that was watched for it.
    done: rounds that have ended.
    """

    variant: Variant
    blueprint: Blueprint
    measured: Measured
    observed: list[Observed] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    done: int = 0


@dataclass(frozen=True)
class Settings:
    """steps: of a round, of which the first warms up. peak_tflops: of a device, None where it is not stated.

    command: of the comparison; config: its file as given; overrides: key=value. watch: whether steps are
    watched after the timed ones, which bounds, memory and timelines come from.
    """

    steps: int
    rounds: int
    peak_tflops: float | None = None
    command: str = ""
    config: Path = Path()
    overrides: Sequence[str] = ()
    watch: bool = True


def make_runs(variants: Sequence[Variant], world: int) -> list[Run]:
    """A run for each layout; raises Refused, naming its file, for any that does not work."""
    runs = []
    for variant in variants:
        try:
            blueprint = draw_up(variant.cfg, world)
        except Refused as error:
            raise Refused(f"{variant.path}: {error}") from error
        runs.append(Run(variant, blueprint, Measured(variant.name, variant.layout)))
    return runs


def compare(
    runs: Sequence[Run], settings: Settings, early: Callable[[Comparison], object]
) -> Comparison | None:
    """Run `steps` steps under each layout in turn (A B B A A B ..); None but on rank 0.

    Every round starts from the same weights, so its losses are those of the layout's first steps. The first
    layout is the baseline of the relative differences and of the speed-up. early: called on rank 0 with what
    was measured until then, before an error or a request that ends the rounds is raised.
    """
    rank = init_distributed(runs[0].blueprint.cfg)
    try:
        host = host_facts(rank.device, dist.get_backend())
        with Stop(rank=True) as stop:
            for number in range(settings.rounds):
                for run in in_turn(runs, number):
                    try:
                        with naming(run.variant, number, settings.rounds):
                            first, watch = number == 0, settings.watch
                            one_round(run, rank, settings.steps, first=first, watch=watch, stop=stop)
                    except BaseException as error:
                        end = reason(error, rank, run.variant.name, str(run.variant.path), number + 1)
                        if rank.rank == 0 and (left := until(runs, end)):
                            tell(early, _result(left, settings, rank.world, host, end))
                        raise
                    run.done += 1
                    if rank.rank == 0:
                        ms = statistics.median(run.measured.rounds[-1]) * 1e3
                        where = f"round {number + 1}/{settings.rounds}, {run.measured.name}"
                        print(f"{where}: {ms:.1f} ms a step", flush=True)
    finally:
        dist.destroy_process_group()
    return None if rank.rank else _result(runs, settings, rank.world, host)


def tell(early: Callable[[Comparison], object], result: Comparison) -> None:
    """Tell of what was measured; what hinders that is said, and is not why the comparison ends."""
    try:
        early(result)
    except Exception as error:
        print(f"what was measured is not written as a whole: {error}", file=sys.stderr, flush=True)


def until(runs: Sequence[Run], end: Stopped) -> list[Run]:
    """The layouts that can be told of, with what they have measured in the rounds that all of them ended."""
    failed = None if end.interrupted else end.name
    kept = [run for run in runs if run.done and run.variant.name != failed]
    rounds = min((run.done for run in kept), default=0)
    return [
        replace(run, measured=run.measured.of_rounds(rounds), observed=run.observed[:rounds], done=rounds)
        for run in kept
    ]


def _result(
    runs: Sequence[Run],
    settings: Settings,
    world: int,
    host: Mapping[str, str | int | float],
    end: Stopped | None = None,
) -> Comparison:
    found = []
    for run in runs:
        one = summarise(run.measured, runs[0].measured)
        one = described(one, run.variant, run.blueprint, settings.config, settings.overrides)
        one = rated(one, world, settings.peak_tflops)
        found.append(watched(one, run.observed, run.memory) if run.observed else one)
    return judge(
        Comparison(
            runs=found,
            command=settings.command,
            config_file=str(settings.config),
            world=world,
            rounds=runs[0].done,
            steps=settings.steps,
            peak_tflops=settings.peak_tflops,
            host=host,
            stopped=end,
        )
    )


@contextmanager
def naming(variant: Variant, number: int, rounds: int) -> Iterator[None]:
    """What fails inside says under which layout it did: the others may well work."""
    try:
        yield
    except PolyrankError as error:  # of which the message alone is shown
        where = f"in round {number + 1} of {rounds}"
        raise type(error)(f"{variant.path}, {where}: {error}") from error
    except Exception as error:
        error.add_note(f"under the layout {variant.name} ({variant.path}), in round {number + 1} of {rounds}")
        raise


def in_turn(runs: Sequence[Run], number: int) -> Sequence[Run]:
    """The layouts in the order of a round: back and forth, so that none always follows the same one, and a
    machine that slows down within each round does so for all alike."""
    return runs[::-1] if number % 2 else runs


def one_round(
    run: Run, rank: RankInfo, steps: int, *, first: bool, watch: bool = True, stop: Stop | None = None
) -> None:
    """`steps` timed steps of a new job, then steps that are watched, if any. first: of the run's rounds.

    stop: raises KeyboardInterrupt on all ranks before the next step once any rank was asked to end.
    """
    cfg = run.blueprint.cfg
    reset_peak(rank.device)  # that of the layouts before: their order must not matter
    run.measured.rounds.append([])
    index = open_index(run.blueprint, cfg.data.train, cfg.base)
    job = build_job(run.blueprint, rank)
    data = open_data(job, index)
    feed = open_feed(job, data)
    try:
        with set_aside():
            for step in range(steps):
                if stop is not None and job.control.gather([float(stop.requested)]).any():
                    raise KeyboardInterrupt
                _timed_step(run, job, feed, step, first)
            if watch:
                run.observed.append(observe_step(job, feed, steps))
            if watch and first:
                run.memory = observe_memory(job, feed, steps + 1)
    finally:
        feed.close()
        data.assembler.reader.close()
    job.close()
    gc.collect()


def _timed_step(run: Run, job: Job, feed: Feed, step: int, first: bool) -> None:
    dist.barrier()
    start = time.perf_counter()
    metrics = train_step(job, feed, step)
    dist.barrier()
    seconds = time.perf_counter() - start
    measured = run.measured
    if step > 0:  # the first step of a round pays for caches and lazy set-up
        measured.rounds[-1].append(seconds)
        measured.add(metrics)
    if first:
        measured.losses.append(metrics.loss)
        measured.grad_norms.append(metrics.grad_norm_by_module)
    measured.peak_memory_bytes = max(measured.peak_memory_bytes, metrics.peak_memory_bytes)
