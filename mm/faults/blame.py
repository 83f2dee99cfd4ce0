"""Who is to blame where a job no longer moves: a pure function of what the ranks have posted last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

SILENT_S = 3.0  # without a post for so long, a rank is silent: it posts every second


@dataclass(frozen=True)
class Post:
    """What a rank posts of itself.

    number: counts its posts. at: what it does, in words. waits: for other ranks, at `site`. still_s: for how
    long it has done or awaited just this. calls: why it asks who is to blame; "" does not. done: it has left.
    """

    number: int
    at: str
    waits: bool = False
    site: str = ""
    still_s: float = 0.0
    calls: str = ""
    done: bool = False

    def dump(self) -> str:
        """As the store has it."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Post | None:
        """From dump(); None of a rank that has not posted yet."""
        return cls(**json.loads(text)) if text.startswith("{") else None


class Seen(NamedTuple):
    """A rank as the one that judges sees it.

    silent_s: since when its posts have stopped. ended: how its process ended, "" where it is not known to
    have; of a process that was stopped by a signal, `stopped`. machine: its name, where that is another one.
    """

    rank: int
    post: Post
    silent_s: float = 0.0
    ended: str = ""
    stopped: bool = False
    machine: str = ""


class Verdict(NamedTuple):
    """rank: the culprit, or None where all wait for each other. why: in words, without the rank. sure:
    whether later posts would not change it."""

    rank: int | None
    why: str
    sure: bool


def blame(ranks: Sequence[Seen]) -> Verdict:
    """The culprit among ranks of which some have waited too long, or have lost a connection.

    One that ended comes first, then one that fell silent, then the one that is longest at its own work. A
    rank that is silent for less than half of the longest wait has not caused that wait. Who only waits is
    innocent.
    """
    left = [r for r in ranks if not r.post.done]
    waited = max((r.post.still_s + r.silent_s for r in left if r.post.waits), default=0.0)
    ended = [r for r in left if r.ended]
    if ended:
        first = max(ended, key=lambda r: r.silent_s)
        return Verdict(first.rank, f"{first.ended}, last seen in {first.post.at}", True)
    silent = [r for r in left if r.stopped or r.silent_s >= max(SILENT_S, waited / 2)]
    if silent:
        # A rank that works is at fault before one that fell silent while it waited for it.
        worst = max(silent, key=lambda r: (r.stopped, _stuck_s(r)))
        if worst.stopped:
            why = f"was stopped by a signal {worst.silent_s:.0f} s ago in {worst.post.at}"
        else:
            why = f"is silent for {worst.silent_s:.0f} s in {worst.post.at}; "
            which = f"its machine {worst.machine}" if worst.machine else "its machine"
            why += f"{which} is cut off, or code there never lets go of the interpreter"
        return Verdict(worst.rank, f"{why}; others wait for it", True)
    working = [r for r in left if not r.post.waits]
    if working:
        worst = max(working, key=_stuck_s)
        stuck = _stuck_s(worst)
        sure = stuck >= SILENT_S and stuck >= waited / 2
        return Verdict(worst.rank, f"hangs for {stuck:.0f} s in {worst.post.at}; others wait for it", sure)
    listed = "; ".join(f"rank {r.rank} in {r.post.at} ({r.post.site})" for r in left[:8])
    more = f"; and {len(left) - 8} more" if len(left) > 8 else ""
    return Verdict(None, f"all ranks wait for each other: {listed}{more}", bool(left))


def _stuck_s(rank: Seen) -> float:
    """Since when a rank has not moved by itself."""
    return rank.silent_s + (0.0 if rank.post.waits else rank.post.still_s)
