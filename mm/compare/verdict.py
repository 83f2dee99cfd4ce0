"""What a comparison means, in plain sentences: the fastest, by how much, what bounds each, what to try."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mm.compare.bound import bound_of, degrees_text
from mm.compare.entry import busy_seconds
from mm.compare.result import Bound, Comparison, Interval, RunResult, Verdict
from mm.compare.summary import speedup_interval, verdict

MISLEADS = 1.5  # by how much a module's share of time and of FLOPs differ before that is said
WORTH = 0.9  # of its time where it is fastest: where a module has less elsewhere, the two are put together
BUSY = 0.5  # load average by core above which a machine is not quiet
MANY_LAYOUTS = 5  # of so many equal ones, chance makes one seem slower in every fifth comparison
MANY_ROUNDS = 1000  # beyond which no number is promised


def judge(found: Comparison) -> Comparison:
    """The comparison with what bounds each layout, and its verdict."""
    shared = found.host.get("cores") if found.host.get("device") == "cpu" else None
    cores = int(shared) if shared is not None else None
    runs = [replace(run, bound=bound_of(run, cores)) for run in found.runs]
    order = sorted(runs, key=lambda run: run.step_s.median)
    best = order[0]
    level = [best, *(run for run in order[1:] if not _slower(run, best))]
    sentences = [_fastest(level, order, found.rounds)]
    base = runs[0]
    if base is not best and len(order) > 2 and base is not order[1]:
        sentences.append(f"The baseline {base.name} takes {_times(base, best)} as long as {best.name}.")
    sentences += _many(order, level)
    sentences += [f"{run.name}: {run.bound.text}" for run in order if run.bound is not None]
    sentences += _misled(best)
    sentences += _differ(runs)
    sentences += _busy(cores, found.host.get("load"))
    sentences = [*stopped_early(found), *sentences]
    return replace(
        found,
        runs=runs,
        verdict=Verdict([run.name for run in level], sentences, next_steps(order, found.rounds, len(level))),
    )


def stopped_early(found: Comparison) -> list[str]:
    """What is missing of a comparison that has not run to its end."""
    end = found.stopped
    if end is None:
        return []
    where = f"in round {end.round} under the layout {end.name} ({end.file})"
    what = "was interrupted" if end.interrupted else "failed"
    who = "" if end.rank is None else f", on rank {end.rank}"
    why = "" if end.interrupted else f": {end.why}"
    rounds = "a round" if found.rounds == 1 else f"{found.rounds} rounds"
    return [
        f"The comparison {what} {where}{who}{why}.",
        f"What follows is of the layouts that ended {rounds}; the baseline is {found.runs[0].name}.",
    ]


def _slower(run: RunResult, best: RunResult) -> bool:
    """Whether the rounds prove that a layout is slower than the fastest."""
    return verdict(speedup_interval(run.rounds, best.rounds)) == "slower"


def _times(slow: RunResult, fast: RunResult) -> str:
    """By which factor a layout takes longer, with its interval."""
    factor = f"{slow.step_s.median / fast.step_s.median:.2f} times"
    interval = speedup_interval(fast.rounds, slow.rounds)
    return factor if interval is None else f"{factor} (95 %: {interval.low:.2f} to {interval.high:.2f})"


def _fastest(level: list[RunResult], order: list[RunResult], rounds: int) -> str:
    """Which layout is fastest, by how much, and whether that is more than noise."""
    best = order[0]
    here = f"{best.step_s.median:.3g} s a step"
    if len(order) == 1:
        return f"{best.name} takes {here}; there is nothing to compare it with."
    if len(level) == 1:
        return (
            f"{best.name} is the fastest, {here}; the next, {order[1].name}, takes "
            f"{_times(order[1], best)} as long. The difference is above noise."
        )
    names = ", ".join(run.name for run in level[1:])
    unknown = any(speedup_interval(run.rounds, best.rounds) is None for run in level[1:])
    if unknown:
        return (
            f"{best.name} had the shortest step ({here}), but the rounds are too few to tell it from {names}."
        )
    tail = ""
    if len(level) < len(order):
        after = next(run for run in order if run not in level)
        tail = (
            f" {after.name} is slower than {best.name} beyond noise: it takes {_times(after, best)} as long."
        )
    near = f"{level[1].name} takes {_times(level[1], best)} as long"
    return (
        f"{best.name} had the shortest step ({here}), but {rounds} rounds cannot tell it from {names}: "
        f"{near}, which is within noise.{tail}"
    )


def _many(order: list[RunResult], level: list[RunResult]) -> list[str]:
    """A warning that intervals are of one pair each, where there are many and some are called slower."""
    if len(order) < MANY_LAYOUTS or len(level) == len(order):
        return []
    return [
        f"Each interval is of one pair: of {len(order)} equal layouts chance alone would make some seem "
        "slower than the fastest more often than 1 time in 20. Time those that are close again, in pairs."
    ]


def _misled(run: RunResult) -> list[str]:
    """A warning where a module takes a far larger share of the time than of the FLOPs."""
    total = sum(run.flops_by_module.values())
    busy = {m: sum(busy_seconds(r, m) for r in run.ranks) for m in run.flops_by_module}
    whole = sum(busy.values())
    if not total or not whole:
        return []
    out = []
    for m, flops in run.flops_by_module.items():
        time, work = busy[m] / whole, flops / total
        if time > 0.2 and time > MISLEADS * work:
            rate = run.tflops_while_busy.get(m, 0.0) * 1e3
            out.append(
                f"FLOPs mislead: in {run.name}, {m} has {work:.0%} of the FLOPs and takes {time:.0%} of the "
                f"time that ranks are busy ({rate:.3g} GFLOP/s a rank while it runs)."
            )
    return out


def _differ(runs: list[RunResult]) -> list[str]:
    """A warning where a layout's losses are not those of the baseline."""
    return [
        f"The losses of {run.name} differ from the baseline's by {run.max_rel_loss_diff:.1e}, more than "
        "rounding explains: find out why before you trust its times."
        for run in runs
        if run.max_rel_loss_diff > 1e-2
    ]


def _busy(cores: int | None, load: object) -> list[str]:
    """A warning where the machine had other work when the comparison began. load: its load average then."""
    if cores is None or not isinstance(load, float) or load < BUSY * cores:
        return []
    return [
        f"The machine was busy with other work when this began (load {load:.3g} on {cores} cores): seconds "
        "are longer than on a quiet one, most of all those of exchanges."
    ]


def next_steps(order: list[RunResult], rounds: int, level: int) -> list[str]:
    """What to try, the most promising first. order: the fastest layout first. level: how many noise ties."""
    best = order[0]
    out = _together(order)
    if best.bound is not None:
        out.append(f"{best.name}: {_ADVICE[best.bound.limit](best, best.bound)}.")
    if level > 1:
        more = rounds_needed(speedup_interval(order[1].rounds, best.rounds), rounds)
        out.append(
            "more rounds (--rounds) to tell the first two apart"
            + (f": about {more} of these" if more is not None else "")
            + "; on a quieter machine fewer will do."
        )
    return out


def rounds_needed(interval: Interval | None, rounds: int) -> int | None:
    """Rounds after which an interval as wide as 1 / sqrt(rounds) would no longer contain 1, if its middle is
    right; None where that is out of reach or unknown."""
    if interval is None or rounds < 1:
        return None
    low, high = math.log(interval.low), math.log(interval.high)
    middle, half = abs(low + high) / 2, (high - low) / 2
    if middle == 0 or half <= middle:
        return None
    needed = math.ceil(rounds * (half / middle) ** 2)
    return needed if needed <= MANY_ROUNDS else None


def _together(order: list[RunResult]) -> list[str]:
    """Each module as it is laid out where it takes least, unless a layout that was measured has all of it."""
    measured = [run for run in order if run.ranks]
    if len(measured) < 2:
        return []
    best, chosen = measured[0], dict[str, RunResult]()
    for m in best.placed:
        took = {run.name: max(busy_seconds(r, m) for r in run.ranks) for run in measured}
        least = min(measured, key=lambda run: took[run.name])
        chosen[m] = least if took[least.name] < WORTH * took[best.name] else best
    if any(all(run.placed[m] == chosen[m].placed[m] for m in chosen) for run in measured):
        return []
    parts = [
        f"{m} as in {run.name} ({degrees_text(run.placed[m])}), where a rank is busy with it for "
        f"{max(busy_seconds(r, m) for r in run.ranks):.3g} s"
        for m, run in chosen.items()
    ]
    return [f"one layout with {' and '.join(parts)}: none of those measured has both."]


def _exchanging(run: RunResult, bound: Bound) -> str:
    degrees, m = run.placed[bound.module].degrees, bound.module
    for axis in ("tp", "cp", "ep", "etp"):
        if degrees[axis] > 1:
            return (
                f"give {m} less {axis} than {degrees[axis]} (its ranks become data parallel, which exchanges "
                "once a step), or the whole model wider, so that a rank computes longer between exchanges"
            )
    return (
        f"another layout.{m}.data_parallel (step or replicate gather weights once a step), or tp for {m} in "
        "the place of data parallel ranks"
    )


def _uneven(run: RunResult, bound: Bound) -> str:
    m = bound.module
    if len(run.placed[m].ranks) < len(run.ranks):
        return f"put {m} on more ranks, or less other work on rank {bound.rank}"
    if run.placed[m].degrees["dp"] > 1:
        return (
            f"more samples a step (train.global_batch), so that all {run.placed[m].degrees['dp']} data "
            f"parallel ranks of {m} have some, or tp or cp for {m} in the place of dp"
        )
    return f"another split of {m} over its ranks"


_ADVICE: dict[str, Callable[[RunResult, Bound], str]] = {
    "computing": lambda run, bound: (
        f"computing {bound.module} is shared by all ranks, so no layout shortens it much: more devices, or a "
        f"cheaper {bound.module}"
    ),
    "uneven": _uneven,
    "pipeline": lambda run, bound: (
        "more schedule.microbatches, or another schedule.kind, so that the stages work at the same time"
    ),
    "cores": lambda run, bound: (
        "a core for each rank, or fewer ranks; until then layouts with less work in all win, not those that "
        "share it best"
    ),
    "exchanging": _exchanging,
    "messages": lambda run, bound: (
        "more schedule.microbatches, so that some compute while rows of others are under way, or modules on "
        "the same ranks"
    ),
    "updating": lambda run, bound: (
        "tp in the place of data parallel ranks (each then has fewer gradients to sum), another "
        "data_parallel, or more samples a step"
    ),
    "data": lambda run, bound: "data.workers=1 or more, and a larger data.prefetch",
}
