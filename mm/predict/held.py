"""Memory of a step: quickly by place of the pipelines, and exactly on the ranks that hold most."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.count.memory import walk
from mm.predict.count.pieces import Piece
from mm.predict.count.rank_plan import RankPlan
from mm.predict.hardware import Hardware
from mm.predict.work import Counts
from parallel.schedule import SchedulePlan
from parallel.schedule.checker.memory import Memory, peaks


def schedule_memory(counts: Counts) -> Memory:
    """What the schedule's actions take and free, as the checker has it."""
    hidden = {(m, s + 1): size for (m, s), size in counts.hidden.items()}  # by the stage that they enter
    rows = counts.rows
    kept: dict[str | tuple[str, int], float] = {key: size for key, size in counts.kept.items()}
    return Memory(activation=kept, load=counts.load, hidden=hidden, held=rows, read=rows)


Kinds = Mapping[str, float]


def by_program(plan: SchedulePlan, counts: Counts, hardware: Hardware) -> Mapping[int, Kinds]:
    """By the first rank of each program, its bytes by kind. What is held at different moments is added up, so
    this is an upper bound for the busiest data rank, worked out in milliseconds."""
    found = peaks(plan, schedule_memory(counts))
    out = {}
    for place, peak in zip(plan.places, found, strict=True):
        held = [counts.held[m, pp] for m, pp in zip(plan.modules, place, strict=True) if pp is not None]
        out[peak.ranks[0]] = {
            "parameters": sum(h.parameters for h in held),
            "optimizer": sum(h.optimizer for h in held),
            "gathered_parameters": sum(h.gathered for h in held),
            "gradients": sum(h.gradients for h in held),
            "activations": peak.bytes,
            "temporary": max((h.temporary for h in held), default=0.0),
            "reserved": hardware.memory.reserved,
        }
    return out


def of_fullest(
    blueprint: Blueprint, plan: StepPlan, counts: Counts, bounds: Mapping[int, Kinds], *, host: bool
) -> Mapping[int, Kinds]:
    """by_program(), with the programs that may hold most counted exactly, on their busiest rank.

    One of them after the other is counted until one that is counted holds most. bounds: of by_program().
    host: of RankPlan.
    """
    schedule = blueprint.schedule(plan.active)
    pieces: dict[Hashable, Piece] = {}
    left = dict(bounds)
    found: dict[int, Kinds] = {}
    while left:
        rank = max(left, key=lambda r: sum(left[r].values()))
        if found and max(_size(k) for k in found.values()) >= _size(left[rank]):
            break
        own = busiest(blueprint, plan, counts, schedule.ranks_of[schedule.program_of[rank]])
        held = walk(RankPlan(blueprint, plan, own, relays=False, rounds=False, host=host, pieces=pieces))
        found[own] = {**held.kinds, "reserved": left[rank]["reserved"]}
        del left[rank]
    return {**found, **left}


def _size(kinds: Kinds) -> float:
    return sum(kinds.values())


def busiest(blueprint: Blueprint, plan: StepPlan, counts: Counts, ranks: Sequence[int]) -> int:
    """Of these ranks the one whose data keep most activations, as far as the plan's costs tell."""
    score = np.zeros(blueprint.world)
    for m in blueprint.modules:
        layout = blueprint.layouts[m]
        dp, cost = (plan.seats.dp, plan.llm_cost) if m == SINK else _dealt(plan, m)
        by_dp = np.bincount(dp, weights=cost, minlength=layout.dp)
        kept = sum(size for (module, _), size in counts.kept.items() if module == m)
        if by_dp.any():
            places = np.arange(layout.size) // (layout.tp * layout.cp) % layout.dp
            score[list(layout.ranks)] += kept * (by_dp / by_dp.max())[places]
    return ranks[int(np.argmax(score[list(ranks)]))]


def _dealt(plan: StepPlan, module: str) -> tuple[np.ndarray, np.ndarray]:
    items = plan.items[module]
    return items.columns.source_dp, items.cost
