"""Proves a plan before it is carried out, for any number of ranks and without a process group.

A plan that passes is complete, in dependency order and free of deadlocks:

- Every rank computes each of its stages exactly once for every micro-batch that needs it.
- Sends and receives between two ranks come in the same order at both ends.
- All members of a process group run the same collectives in the same order.
- Under the executor's rules, every action gets what it waits for, on gloo and, unless that alone is asked
  for, on NCCL (streams.py).

Ranks that share a program are checked once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import zip_longest
from typing import Literal

from parallel.schedule.action import (
    BOUNDARY,
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    ActionKey,
    Kind,
)
from parallel.schedule.checker.graph import graph_of
from parallel.schedule.checker.memory import Memory, Peak, check_limit, peaks
from parallel.schedule.checker.order import Stuck
from parallel.schedule.checker.streams import FirstUse, find_ring
from parallel.schedule.plan import (
    ModuleUse,
    SchedulePlan,
    compute_groups,
    gather_groups,
    parameter_groups,
)
from parallel.topology.groups import WORLD, Direction, Group


class PlanError(ValueError):
    """A plan that must not be executed. problems: everything found, each with its ranks and actions."""

    def __init__(self, kind: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        super().__init__(f"schedule {kind}: " + "; ".join(problems[:6]) + more)


Backend = Literal["gloo", "nccl"]


def check(
    plan: SchedulePlan,
    *,
    backend: Backend = "nccl",
    first_use: FirstUse = "connected",
    limit: float | None = None,
    memory: Memory | None = None,
) -> tuple[Peak, ...]:
    """The activation high-water mark of each program.

    backend: what the plan is to run on. "gloo" buffers and honours tags; what passes "nccl" passes "gloo".
    first_use: what the first use of a communicator waits for on NCCL, as in streams.find_ring(); a job that
        has used all of them before its first step is "connected".

    Raises PlanError where `plan` is wrong, and ValueError where a rank holds activations above `limit`, in
    units of `memory`.
    """
    problems = [
        problem
        for p, actions in enumerate(plan.programs)
        for problem in (
            *_complete(plan, p, actions),
            *_named(plan, p, actions),
            *_pairs(plan, p, actions),
            *_parameters(plan, p, actions),
        )
    ]
    if not problems:
        problems = [*_transfers(plan), *_collectives(plan)]
    if not problems:
        # A plan with the right actions in every list can still wait for itself.
        try:
            graph_of(plan)
        except Stuck as stuck:
            problems = [str(stuck)]
    if not problems and backend == "nccl":
        problems = _ring(plan, first_use)
    if problems:
        raise PlanError(plan.kind, problems)
    return peaks(plan, memory) if limit is None else check_limit(plan, limit, memory)


def _ring(plan: SchedulePlan, first_use: FirstUse) -> list[str]:
    """Why a plan that gloo can run may not be run on NCCL."""
    ring = find_ring(plan, "one", first_use)
    if ring is None:
        return []
    sure = find_ring(plan, "each", first_use)
    if sure is not None:
        return [f"it hangs on NCCL, whose communicators carry out one call after the other: {sure}"]
    return [f"its ranks have no common order of operations, which NCCL needs: {ring}"]


def _complete(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """The actions that a program lacks, has twice or should not have."""
    have: list[ActionKey] = [a[:4] for a in actions if a.span == 1 and a.kind not in _STEPWISE]
    for a in actions:
        if a.span > 1 and a.kind in COMPUTE:
            have += [(a.kind, a.module, i, a.stage) for i in _covered(plan, a)]
        elif a.span > 1:
            have.append(a[:4])
    done, need = set(have), set[ActionKey]()
    for kind, module, stage, microbatches in _needed(plan, p, actions, done):
        need.update([(kind, module, i, stage) for i in microbatches])
    if done == need and len(have) == len(done):
        return
    rank = plan.ranks_of[p][0]
    for lacking in sorted(map(_describe, need - done)):
        yield f"rank {rank} lacks {lacking}"
    for key, n in Counter(have).items():
        if key not in need:
            yield f"rank {rank} has {_describe(key)}, which nothing needs there"
        elif n > 1:
            yield f"rank {rank} does {_describe(key)} {n} times"


def _describe(key: ActionKey) -> str:
    return str(Action(*key))


def _covered(plan: SchedulePlan, a: Action) -> list[int]:
    """The micro-batches that a computation is for: of a source, those with items."""
    covered = a.microbatches
    if a.module not in plan.sources or covered.stop > plan.microbatches:
        return list(covered)  # micro-batches that do not exist are reported as not needed
    return [i for i in covered if a.module in plan.active[i]] or list(covered)


def _needed(
    plan: SchedulePlan, p: int, actions: Sequence[Action], done: Set[ActionKey]
) -> Iterator[tuple[Kind, str, int, Iterable[int]]]:
    """What the ranks of a program must do exactly once: (kind, module, stage, micro-batches)."""
    every = range(plan.microbatches)
    for module, pp in zip(plan.modules, plan.places[p], strict=True):
        if pp is None:
            continue
        use, sink = plan.modules[module], module == plan.sink
        takes = [i for i in every if sink or module in plan.active[i]]
        learns = [i for i in takes if plan.learns(module, i)]
        for stage in use.stages_at(pp):
            yield Kind.FORWARD, module, stage, takes
            halves = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
            split = {i for i in learns if any((half, module, i, stage) in done for half in halves)}
            for half in halves[: 1 if use.frozen else 2]:
                yield half, module, stage, split
            yield Kind.BACKWARD, module, stage, [i for i in learns if i not in split]
            # A message of a source carries the first micro-batch of its computation.
            starts, back = takes, learns
            if not sink:
                forward = (Kind.FORWARD, module, stage)
                starts = [a.microbatch for a in actions if (a.kind, a.module, a.stage) == forward]
                back = starts if learns else []
            if stage:
                yield Kind.RECV_FORWARD, module, stage, starts
                yield Kind.SEND_BACKWARD, module, stage, back
            if stage + 1 < use.stages:
                yield Kind.SEND_FORWARD, module, stage, starts
                yield Kind.RECV_BACKWARD, module, stage, back
    for source in plan.sources:
        for stage in plan.modules[source].enters:
            sources, targets = plan.ends(source, stage)
            if p in sources | targets:
                rows = [i for i in every if source in plan.active[i]]
                yield Kind.BOUNDARY_FORWARD, source, stage, rows
                if plan.train and not plan.modules[source].frozen:
                    yield Kind.BOUNDARY_BACKWARD, source, stage, rows


def _named(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """Actions with other groups or another peer than they use."""
    uses = {
        (kind, m, summed): _groups(kind, m, use, summed)
        for kind in Kind
        for m, use in plan.modules.items()
        for summed in (False, True)
    }
    late = {(a.module, a.stage) for a in actions if a.kind is Kind.GRAD_SYNC}
    for a in actions:
        if a.module not in plan.modules:
            continue  # reported as not needed
        summed = a.last and (a.module, a.stage) not in late
        wanted, step = uses[a.kind, a.module, summed], _PEER.get(a.kind)
        if a.kind in BOUNDARY:
            wanted = (wanted[0]._replace(stage=a.stage),)
        peer = None if step is None else a.stage + step
        if a.kind in _STEPWISE and a.microbatches != range(1):
            yield f"rank {plan.ranks_of[p][0]}: {a} is for a whole step, so its micro-batch must be 0"
        if a.groups != wanted or a.peer != peer:
            yield (
                f"rank {plan.ranks_of[p][0]}: {a} names groups [{', '.join(map(str, a.groups))}] and peer "
                f"{a.peer}, needed: [{', '.join(map(str, wanted))}] and {peer}"
            )


def _groups(kind: Kind, module: str, use: ModuleUse, summed: bool) -> tuple[Group, ...]:
    """The groups that an action uses. summed: it sums the gradients of the step."""
    if kind in COMPUTE:
        return compute_groups(module, use, kind, summed)
    if kind in BOUNDARY:
        return (Group("edge", module, direction=_DIRECTION[kind]),)
    if kind in SENDS or kind in RECEIVES:
        return (Group("module", module, "pp", _DIRECTION[kind]),)
    if kind is Kind.GATHER:
        return gather_groups(module, use)
    if kind is Kind.GRAD_SYNC:
        return parameter_groups(module, use)
    return (WORLD,) if kind is Kind.OPTIMIZER else ()


# How many stages further the other end of a message is.
_PEER = {Kind.SEND_FORWARD: 1, Kind.RECV_FORWARD: -1, Kind.SEND_BACKWARD: -1, Kind.RECV_BACKWARD: 1}
_FORWARD = (Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.BOUNDARY_FORWARD)
_DIRECTION: dict[Kind, Direction] = {
    k: "forward" if k in _FORWARD else "backward" for k in SENDS | RECEIVES | BOUNDARY
}
_STEPWISE = frozenset({Kind.GATHER, Kind.FREE, Kind.GRAD_SYNC, Kind.OPTIMIZER})


def _pairs(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """Pairs of something else than a forward and a backward that may take turns."""
    for a, b in zip_longest(actions, actions[1:]):
        if not a.paired or a.module not in plan.modules:
            continue
        what = f"rank {plan.ranks_of[p][0]}: {a} is paired with {b or 'nothing'}"
        both = b is not None and (a.kind, b.kind) == (Kind.FORWARD, Kind.BACKWARD) and not b.paired
        if not both or a.module != b.module or set(a.microbatches) & set(b.microbatches):
            yield f"{what}; needed: a backward of another micro-batch of {a.module}"
        elif plan.modules[a.module].params == "each":
            yield f"{what}, but weights of {a.module} do not stay whole between the two"


def _parameters(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """Parameters that are not there when used, and gradients that are not summed once when complete."""
    rank = plan.ranks_of[p][0]
    used: dict[tuple[str, int], list[int]] = defaultdict(list)  # indices of computations
    last: dict[tuple[str, int], list[int]] = defaultdict(list)  # of actions marked as last
    on: dict[tuple[str, int], dict[Kind, list[int]]] = defaultdict(lambda: defaultdict(list))
    for k, a in enumerate(actions):
        if a.kind in COMPUTE:
            used[a.module, a.stage].append(k)
        elif a.kind in _STEPWISE:
            on[a.module, a.stage][a.kind].append(k)
        if a.last:
            last[a.module, a.stage].append(k)
    for key in dict.fromkeys((*used, *last, *on)):
        if key[0] in plan.modules:
            for problem in _of_stage(plan.modules[key[0]], key, actions, used[key], last[key], on[key]):
                yield f"rank {rank} {problem}"
    updates = [k for k, a in enumerate(actions) if a.kind is Kind.OPTIMIZER]
    if updates and updates != [len(actions) - 1]:
        yield f"rank {rank} does optimizer {len(updates)} times, needed: once, after everything"


def _of_stage(
    use: ModuleUse,
    key: tuple[str, int],
    actions: Sequence[Action],
    used: Sequence[int],
    last: Sequence[int],
    on: Mapping[Kind, Sequence[int]],
) -> Iterator[str]:
    """What is wrong with the last backward, and with the actions `on` parameters, of one stage."""
    module, name = key[0], f"{key[0]}.{key[1]}"
    final = next((k for k in reversed(used) if actions[k].kind is not Kind.FORWARD), None)
    if list(last) != ([] if final is None else [final]):
        marked = ", ".join(str(actions[k]) for k in last) or "none"
        yield f"marks {marked} as last of {name}, which is {'none' if final is None else actions[final]}"
    sharded = bool(parameter_groups(module, use)) and bool(used)
    wanted = {Kind.GATHER: 0, Kind.FREE: 0, Kind.GRAD_SYNC: 0}
    if use.params == "step" and gather_groups(module, use) and used:
        wanted |= {Kind.GATHER: 1, Kind.FREE: 1}
    alone = use.params != "each" and use.sums == "step" and not use.frozen
    if alone and sharded and final is not None and on.get(Kind.GRAD_SYNC):
        wanted[Kind.GRAD_SYNC] = 1  # else the last backward sums: _named() asks for its groups
    found = {kind: on.get(kind, ()) for kind in wanted}
    for kind, n in wanted.items():
        if len(found[kind]) != n:
            yield f"does {kind.value}({name}) {len(found[kind])} times, needed: {n}"
    if not used:
        return
    if any(k > used[0] for k in found[Kind.GATHER][:1]):
        yield f"does {actions[used[0]]} before gather({name})"
    if any(k < used[-1] for k in found[Kind.FREE][-1:]):
        yield f"does {actions[used[-1]]} after free({name})"
    if final is not None and any(k < final for k in found[Kind.GRAD_SYNC][-1:]):
        yield f"does {actions[final]} after grad_sync({name})"


def _transfers(plan: SchedulePlan) -> Iterator[str]:
    """Sends of one rank and receives of another that are not in the same order."""
    sends: dict[tuple[int, str, int, str], list[Action]] = defaultdict(list)
    receives: dict[tuple[int, str, int, str], list[Action]] = defaultdict(list)
    for p, a in plan:
        if a.kind in SENDS or a.kind in RECEIVES:
            assert a.peer is not None
            direction = _DIRECTION[a.kind]
            table = sends if a.kind in SENDS else receives
            table[p, a.module, a.peer % plan.modules[a.module].layout.pp, direction].append(a)
    for module, use in plan.modules.items():
        chains = {tuple(plan.program_of[r] for r in ranks) for ranks in use.layout.groups("pp")}
        pairs = {
            (a, i, chain[j], j)
            for chain in chains
            for i, a in enumerate(chain)
            for j in ((i - 1) % len(chain), (i + 1) % len(chain))
            if i != j
        }
        for p, i, q, j in sorted(pairs):
            for direction in ("forward", "backward"):
                out, back = sends[p, module, j, direction], receives[q, module, i, direction]
                wrong = _differ([_message(a) for a in out], [_message(a) for a in back])
                if wrong is not None:
                    yield (
                        f"message {wrong} of rank {plan.ranks_of[p][0]} to rank {plan.ranks_of[q][0]}: "
                        f"{_nth(out, wrong)} meets {_nth(back, wrong)}"
                    )


def _collectives(plan: SchedulePlan) -> Iterator[str]:
    """Process groups whose members do not run the same collectives in the same order."""
    seen: dict[Group, dict[int, list[Action]]] = defaultdict(lambda: defaultdict(list))
    for p, a in plan:
        if a.kind not in SENDS and a.kind not in RECEIVES:
            for group in a.groups:
                seen[group][p].append(a)
    for group, of in seen.items():
        for members in plan.program_sets(group):
            first, *others = sorted(members)
            for p in others:
                wrong = _differ([_collective(a) for a in of[first]], [_collective(a) for a in of[p]])
                if wrong is not None:
                    yield (
                        f"collective {wrong} of group {group}: rank {plan.ranks_of[first][0]} does "
                        f"{_nth(of[first], wrong)}, rank {plan.ranks_of[p][0]} does {_nth(of[p], wrong)}"
                    )


def _message(a: Action) -> tuple[int, int, int, int]:
    """What both ends of a message must agree on."""
    assert a.peer is not None
    ends = (a.stage, a.peer) if a.kind in SENDS else (a.peer, a.stage)
    return (*ends, a.microbatch, a.span)


def _collective(a: Action) -> tuple[Kind, str, int, int, int, bool]:
    return (a.kind, a.module, a.stage, a.microbatch, a.span, a.paired)


def _differ(a: Sequence[object], b: Sequence[object]) -> int | None:
    """The first index at which two sequences differ."""
    if a == b:
        return None
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nth(actions: Sequence[Action], k: int) -> str:
    return str(actions[k]) if k < len(actions) else "nothing"
