"""A fault that was injected, what came of it, and the table of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

END_S = 10.0  # within which everything ends, after run.timeout_s where that is waited for
EVERY = 4  # steps between checkpoints (forge.config)
# Steps that a fault may cost: a checkpoint is written in the background, and done before the next begins.
LOST = 2 * EVERY


@dataclass
class Injected:
    """One fault and what came of it. wrong: what fell short."""

    kind: str
    rank: int
    step: int
    seconds: float = 0.0
    lost: int = 0  # steps that are done again
    wrong: list[str] = field(default_factory=list)
    said: str = ""


def line(found: Injected) -> str:
    ended = f"{found.seconds:5.1f} s, {found.lost} steps again"
    return f"{found.kind:<22} rank {found.rank}  step {found.step:>4}  {ended}  {'; '.join(found.wrong)}"


def table(found: Sequence[Injected]) -> str:
    """By kind: injected, survived, named rightly, seconds to end (median, most), steps done again (most)."""
    rows = ["| fault | injected | as it should be | s to the end, median | most | steps again, most |"]
    rows.append("|---|---|---|---|---|---|")
    for kind in dict.fromkeys(f.kind for f in found):
        some = [f for f in found if f.kind == kind]
        seconds = sorted(f.seconds for f in some)
        good = sum(not f.wrong for f in some)
        rows.append(
            f"| {kind} | {len(some)} | {good} | {seconds[len(seconds) // 2]:.1f} | {seconds[-1]:.1f} | "
            f"{max(f.lost for f in some)} |"
        )
    return "\n".join(rows)
