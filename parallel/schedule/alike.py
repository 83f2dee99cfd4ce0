"""Jobs of the same schedule: which layouts have equal actions, on whichever ranks their modules are. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace

from parallel.schedule.plan import ModuleUse, SchedulePlan, places
from parallel.topology.groups import REPLICA, SHARD, along, size_along

_AXES = tuple(
    f"{axis}{part}" for axis in ("tp", "cp", "etp", "ep", "data", "edp") for part in ("", SHARD, REPLICA)
)
AXES = tuple(a for a in _AXES if a.startswith(("data", "edp")) or "_" not in a)


def pattern_of(modules: Mapping[str, ModuleUse]) -> Hashable:
    """All of modules that the actions of a step, and what these wait for, follow from: the places in order,
    who shares a group with whom, and how each module holds its weights. How many ranks are at a place, and
    which, is left out. O(ranks)."""
    where = places({m: use.layout for m, use in modules.items()})
    number = {place: p for p, place in enumerate(dict.fromkeys(where.values()))}
    program = {rank: number[place] for rank, place in where.items()}
    return tuple(number), tuple(_pattern(m, use, program) for m, use in modules.items())


def _pattern(module: str, use: ModuleUse, program: Mapping[int, int]) -> Hashable:
    """A module's part of pattern_of()."""
    layout = use.layout
    several = tuple(axis for axis in AXES if size_along(layout, axis, use.shards) > 1)
    stages = [frozenset(program[r] for r in layout.stage_ranks(k)) for k in range(layout.pp)]
    joined: Hashable = ()
    chains = frozenset(tuple(program[r] for r in line) for line in layout.groups("pp"))
    if any(len(found) > 1 for found in stages):  # else each group is of one program
        joined = tuple(
            frozenset(frozenset(program[r] for r in ranks) for ranks in along(layout, axis, use.shards))
            for axis in (*several, "dp")
        )
    own = use.frozen, use.params, use.sums, use.experts, use.layers, use.enters
    return module, layout.pp, layout.vpp, own, several, chains, joined


def moved(plan: SchedulePlan, modules: Mapping[str, ModuleUse]) -> SchedulePlan:
    """A plan on the ranks of other modules of the same pattern_of(), with what was worked out from it."""
    if plan.modules == modules:
        return plan
    where = places({m: use.layout for m, use in modules.items()})
    number = {place: p for p, place in enumerate(dict.fromkeys(where.values()))}
    made = replace(plan, modules=modules, program_of={rank: number[place] for rank, place in where.items()})
    made.memo.update(plan.memo)
    return made
