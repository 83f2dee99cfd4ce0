"""What bounds a layout, as a sentence that names the module, the rank and what the others do meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from mm.compare.chain import chain_of
from mm.compare.entry import COMPUTING, busy_seconds
from mm.compare.result import Bound, Limit, Placed, RankResult, RunResult

EVEN = 0.7  # ranks share a module's work where their mean is at least this part of what the chain computes


def bound_of(run: RunResult, cores: int | None) -> Bound | None:
    """What bounds a layout; None where no step was watched. cores: of the machine that all its ranks share,
    None where each has a device of its own."""
    chain = chain_of(run)
    if not chain:
        return None
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for part, seconds in chain.items():
        sums[part.what, part.module] += seconds
    (what, module), seconds = max(sums.items(), key=lambda item: item[1])
    most = {part.rank: s for part, s in chain.items() if (part.what, part.module) == (what, module)}
    rank = max(most, key=lambda r: most[r])
    step = max(r.step_s for r in run.ranks)
    share = min(1.0, seconds / step)
    limit, text = _sentence(run, what, module, rank, seconds, step)
    if limit == "cores":
        text += f" ({len(run.ranks)} ranks on {cores} cores, with whatever else runs there)"
    return Bound(limit, module, rank, share, f"{text}.{_longest_wait(run, step)}")


def _sentence(
    run: RunResult, what: str, module: str, rank: int, seconds: float, step: float
) -> tuple[Limit, str]:
    """The limit in a word and in a sentence without its end."""
    took = f"{seconds:.3g} s of a step's {step:.3g} s ({seconds / step:.0%})"
    if what == "exchanging":
        inside = degrees_text(run.placed[module])
        worked = computed(run.ranks[rank], module)
        return "exchanging", (
            f"exchanges within {module} ({inside}) take {took}, most on rank {rank}, which computes {module} "
            f"for {worked:.3g} s"
        )
    if what == "cores":
        return "cores", f"waiting for a core takes {took}, most on rank {rank}"
    if what == "computing":
        return _computing(run, module, rank, took, seconds)
    if what == "messages":
        return "messages", (
            f"rows, hidden states and gradients under way to rank {rank} and others take {took}"
        )
    if what == "updating":
        return "updating", f"gradient sums and the optimizer take {took}"
    return "data", f"rank {rank} waits {took} for data"


def _computing(run: RunResult, module: str, rank: int, took: str, seconds: float) -> tuple[Limit, str]:
    """Whether a module's ranks share its work, or one computes while the others wait."""
    here = run.placed[module]
    work = {r.rank: computed(r, module) for r in run.ranks}
    mean = sum(work.values()) / len(work)
    if mean >= EVEN * seconds:
        return "computing", f"computing {module} takes {took}, much alike on all ranks, most on rank {rank}"
    others = [r for r in work if r != rank]
    rest = sum(work[r] for r in others) / len(others)
    if here.degrees["pp"] > 1:
        return "pipeline", (
            f"the stages of {module} (pp {here.degrees['pp']}) wait for each other: computing it one "
            f"stage after the other takes {took}, of which a rank computes {mean:.3g} s"
        )
    away = [r for r in others if r not in here.ranks]
    why = f"; {ranks_text(away)} {'do' if len(away) > 1 else 'does'} not have it" if away else ""
    return "uneven", (
        f"computing {module} takes {took}, most on rank {rank}, while other ranks compute it for {rest:.3g} s"
        f"{why}"
    )


def _longest_wait(run: RunResult, step: float) -> str:
    """Who waits longest for what, where that is a tenth of the step or more."""
    waits: dict[tuple[int, str], float] = defaultdict(float)
    for rank in run.ranks:
        for a in rank.actions:
            waits[rank.rank, a.module] += a.waited
    if not waits:
        return ""
    (rank_number, module), seconds = max(waits.items(), key=lambda item: item[1])
    if seconds < 0.1 * step:
        return ""
    return f" Rank {rank_number} waits longest: {seconds:.3g} s for inputs of {module}."


def computed(rank: RankResult, module: str) -> float:
    """Seconds that a rank's thread computed a module for; on an accelerator, that it was in its actions."""
    found = [a.processor for a in rank.actions if a.module == module and a.kind in COMPUTING]
    if any(p is None for p in found):
        return busy_seconds(rank, module)
    return sum(p for p in found if p is not None)


def degrees_text(placed: Placed) -> str:
    """The degrees of a module above 1, such as tp 2, dp 4; one rank where there are none."""
    degrees: Mapping[str, int] = placed.degrees
    found = [f"{axis} {degrees[axis]}" for axis in ("tp", "cp", "dp", "pp", "ep", "etp") if degrees[axis] > 1]
    if placed.sequence_parallel:
        found.append("sequence parallel")
    return ", ".join(found) or "one rank"


def ranks_text(ranks: list[int]) -> str:
    """Ranks by name."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
