"""Pipelines: in which order each pipeline rank of one module computes. Pure.

Each generator takes a pipeline rank `r` of `p`, the number `v` of virtual stages a rank and the number `m` of
micro-batches. Virtual stage s is on rank s % p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Kind


class Work(NamedTuple):
    """One computation of micro-batches [microbatch, microbatch + span). paired: Action.paired."""

    kind: Kind
    module: str
    stage: int
    microbatch: int
    span: int = 1
    paired: bool = False


class StageWork(NamedTuple):
    """One computation of a pipeline. paired: Action.paired."""

    kind: Kind
    stage: int
    microbatch: int
    paired: bool = False


Order = list[StageWork]
Pipeline = Callable[[int, int, int, int], Order]  # (r, p, v, m)


def sequential(r: int, p: int, v: int, m: int) -> Order:
    """One micro-batch at a time through all stages and back: the reference, with the least memory."""
    stages = range(r, p * v, p)
    out: Order = []
    for i in range(m):
        out += [StageWork(FORWARD, s, i) for s in stages]
        out += [StageWork(BACKWARD, s, i) for s in reversed(stages)]
    return out


def gpipe(r: int, p: int, v: int, m: int) -> Order:
    """All micro-batches forward, then all backward (GPipe, arXiv 1811.06965)."""
    stages = range(r, p * v, p)
    out: Order = [StageWork(FORWARD, s, i) for s in stages for i in range(m)]
    return out + [StageWork(BACKWARD, s, i) for s in reversed(stages) for i in range(m)]


def one_f_one_b(r: int, p: int, v: int, m: int) -> Order:
    """1F1B (PipeDream-flush, arXiv 2006.09503), with v > 1 interleaved (arXiv 2104.04473, section 2.2).

    In the warm-up, rank r computes as many forwards as it takes until its first gradient comes back. In the
    steady state it alternates forwards and backwards, and in the cool-down it computes the backwards that are
    left. Interleaved, micro-batches go through the virtual stages of a rank in rounds of p. A last round of
    fewer has the order of a whole one, without the micro-batches that do not exist.
    """
    return _alternating(r, p, v, m, min(2, v) * (p - r - 1) + (v - 1) * p)


def paired_1f1b(r: int, p: int, v: int, m: int) -> Order:
    """1F1B in whose steady state each forward runs together with the backward after it.

    Neither may depend on the other, through whatever ranks. So rank r takes one forward more and, as its
    gradient comes back through p - r - 1 pairs, p - r - 1 more (DeepSeek-V3, arXiv 2412.19437, section 3.2.1;
    Megatron-LM's overlap of expert exchanges warms up like this). It has 2 (p - r) micro-batches in flight
    where 1F1B has p - r.
    """
    return _alternating(r, p, v, m, 2 * (p - r - 1) + (v - 1) * p + 1, paired=True)


def _alternating(r: int, p: int, v: int, m: int, warm: int, *, paired: bool = False) -> Order:
    """`warm` forwards, then one forward and one backward in turn, then the backwards that are left."""
    total = (m if v == 1 else -(-m // p) * p) * v

    def forward(k: int) -> StageWork:
        turn, within = divmod(k, p * v)
        return StageWork(FORWARD, (within // p) * p + r, turn * p + within % p)

    def backward(k: int) -> StageWork:
        turn, within = divmod(k, p * v)
        return StageWork(BACKWARD, (v - 1 - within // p) * p + r, turn * p + within % p)

    warm = min(total, warm)
    out = [forward(k) for k in range(warm)]
    for k in range(warm, total):
        there, back = forward(k), backward(k - warm)
        out += [there._replace(paired=paired and back.microbatch < m), back]
    out += [backward(k) for k in range(total - warm, total)]
    return [work for work in out if work.microbatch < m]


def zero_bubble(r: int, p: int, v: int, m: int) -> Order:
    """1F1B with backward split: ZB-H1 of arXiv 2401.10241 for v = 1, and the same rule interleaved.

    A weight gradient waits until rank r has r more input gradients done. So the stage before gets its
    gradient early, and the weight gradients fill the idle time at the end. Rank r then holds p - r
    micro-batches for their backward and r for their weight gradients: p together, as the first rank of 1F1B
    does.
    """
    out: Order = []
    waiting: list[StageWork] = []
    for work in one_f_one_b(r, p, v, m):
        if work.kind is FORWARD:
            out.append(work)
            continue
        out.append(work._replace(kind=BACKWARD_INPUT))
        waiting.append(work._replace(kind=BACKWARD_WEIGHT))
        if len(waiting) > r:
            out.append(waiting.pop(0))
    return out + waiting


def windows(pipeline: Pipeline, sizes: Iterable[int], r: int, p: int, v: int) -> Order:
    """A pipeline that fills and drains once for each of consecutive windows of `sizes` micro-batches."""
    out: Order = []
    first = 0
    for n in sizes:
        out += [w._replace(microbatch=first + w.microbatch) for w in pipeline(r, p, v, n)]
        first += n
    return out


PIPELINES: Mapping[str, Pipeline] = {
    "sequential": sequential,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "three_phase": one_f_one_b,
    "interleaved": one_f_one_b,
    "zero_bubble": zero_bubble,
    "fill": one_f_one_b,
}
# Those with pairs, by the schedule's name.
PAIRED: Mapping[str, Pipeline] = {"1f1b": paired_1f1b, "interleaved": paired_1f1b}
