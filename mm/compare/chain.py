"""The longest chain of a step that was watched: of actions that waited for each other, what each spent.

A rank that waits bounds nothing: what bounds the step is what it waits for. So the chain begins with the
computation that ended last and goes back. Where a computation had to wait for its inputs, the chain goes on
where these came from; else with what its rank did before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from mm.compare.result import Arrow, Bar, RankResult, RunResult, Timeline


class Part(NamedTuple):
    """What a stretch of the chain was, on which rank.

    what: computing, cores (waiting for one), exchanging (within a module), messages, updating or data.
    """

    what: str
    module: str
    rank: int


def chain_of(run: RunResult) -> dict[Part, float]:
    """Seconds of a watched step by what its longest chain spent them on. They add up to about the step."""
    out: dict[Part, float] = defaultdict(float)
    line = run.timeline
    if line is None or not line.bars:
        return {}
    by_rank = {rank.rank: rank for rank in run.ranks}
    links, paused = _links(line)
    for bar in links:
        rank = by_rank[line.ranks[bar.row]]
        seconds, (computing, queued) = bar.end - bar.start, _shares(rank, bar)
        out[Part("computing", bar.module, rank.rank)] += seconds * computing
        out[Part("cores", "", rank.rank)] += seconds * queued
        out[Part("exchanging", bar.module, rank.rank)] += seconds * (1 - computing - queued)
    for row, seconds in paused.items():
        out[Part("messages", "", line.ranks[row])] += seconds
    last = by_rank[line.ranks[links[0].row]]
    out[Part("updating", "", last.rank)] += last.update_s
    out[Part("data", "", last.rank)] += last.data_s
    return {part: seconds for part, seconds in out.items() if seconds > 1e-9}


def _shares(rank: RankResult, bar: Bar) -> tuple[float, float]:
    """Shares of an action that its rank computed, and waited for a core. The rest went to exchanges."""
    for a in rank.actions:
        if (a.module, a.kind) == (bar.module, bar.kind):
            worked = a.seconds - a.waited
            if a.processor is None or worked <= 0:
                return 1.0, 0.0
            computing = min(1.0, a.processor / worked)
            return computing, min(1.0 - computing, (a.queued or 0.0) / worked)
    return 1.0, 0.0


def _links(line: Timeline) -> tuple[list[Bar], dict[int, float]]:
    """The chain, its last computation first, and by row the seconds between them."""
    rows: list[list[Bar]] = [[] for _ in line.ranks]
    for bar in sorted(line.bars, key=lambda b: b.start):
        rows[bar.row].append(bar)
    needed: dict[int, list[Arrow]] = defaultdict(list)
    for arrow in line.arrows:
        needed[id(line.bars[arrow.bar])].append(arrow)
    at: Bar | None = max(line.bars, key=lambda b: b.end)
    links: list[Bar] = []
    paused: dict[int, float] = defaultdict(float)
    while at is not None:
        links.append(at)
        before = _before(rows[at.row], at.start)
        free = before.end if before is not None else 0.0
        last = max(needed[id(at)], key=lambda a: a.sent, default=None)
        if last is not None and last.sent > free:  # its rank was free before what it needed was sent
            before = _before(rows[last.source], min(last.sent, at.start))
            free = before.end if before is not None else 0.0
        paused[at.row] += max(0.0, at.start - free)
        at = before
    return links, paused


def _before(bars: Sequence[Bar], start: float) -> Bar | None:
    """The computation of a row that began last before `start`."""
    return max((b for b in bars if b.start < start), key=lambda b: b.start, default=None)
