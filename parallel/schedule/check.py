"""Proves a plan before it is carried out, for any number of ranks and without a process group.

A plan that passes is complete, in dependency order and free of deadlocks: every rank computes each of its
stages exactly once for every micro-batch that needs it; sends and receives between two ranks come in the same
order at both ends; all members of a process group see the same collectives in the same order; and run by the
rules of the executor, every action gets what it waits for. Ranks of one program are checked once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.schedule.action import BOUNDARY, COMPUTE, RECEIVES, SENDS, Action, Kind
from parallel.schedule.memory import Memory, Peak, check_limit, peaks
from parallel.schedule.plan import SchedulePlan, compute_groups, parameter_groups
from parallel.schedule.simulate import Stuck, simulate


class PlanError(ValueError):
    """A plan that must not be executed. problems: all that was found, each naming ranks and actions."""

    def __init__(self, kind: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        super().__init__(f"schedule {kind}: " + "; ".join(problems[:6]) + more)


def check(
    plan: SchedulePlan, *, limit: float | None = None, memory: Memory | None = None
) -> tuple[Peak, ...]:
    """Raise PlanError where `plan` is wrong, ValueError where a rank holds activations above `limit`.

    Returns the activation high-water mark of each program.
    """
    problems = [
        problem
        for p, actions in enumerate(plan.programs)
        for problem in (
            *_complete(plan, p, actions),
            *_named(plan, p, actions),
            *_parameters(plan, p, actions),
        )
    ]
    if not problems:
        problems = [*_transfers(plan), *_collectives(plan)]
    if not problems:
        # A plan with the right actions in every list can still wait for itself.
        try:
            simulate(plan)
        except Stuck as stuck:
            problems = [str(stuck)]
    if problems:
        raise PlanError(plan.kind, problems)
    return peaks(plan, memory) if limit is None else check_limit(plan, limit, memory)


class _Deed(NamedTuple):
    """What must be done once: an action without its place in the list."""

    kind: Kind
    module: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return str(Action(self.kind, self.module, self.microbatch, stage=self.stage))


def _complete(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """What a program lacks, has twice or should not have."""
    rank = plan.ranks_of[p][0]
    have: Counter[_Deed] = Counter()
    for a in actions:
        if a.kind in COMPUTE:
            have.update(_Deed(a.kind, a.module, a.stage, i) for i in _covered(plan, a))
        elif a.kind in _STEPWISE:
            continue
        else:
            have[_Deed(a.kind, a.module, a.stage, a.microbatch)] += 1
    need = set(_needed(plan, p, actions, have))
    for deed in sorted(need - set(have), key=str):
        yield f"rank {rank} lacks {deed}"
    for deed, n in have.items():
        if deed not in need:
            yield f"rank {rank} has {deed}, which nothing needs there"
        elif n > 1:
            yield f"rank {rank} does {deed} {n} times"


def _covered(plan: SchedulePlan, a: Action) -> list[int]:
    covered = range(a.microbatch, a.microbatch + a.span)
    if a.module == plan.sink or a.module not in plan.modules:
        return list(covered)
    if covered.stop > plan.microbatches:
        return list(covered)  # what does not exist is reported as such
    return [i for i in covered if a.module in plan.active[i]] or list(covered)


def _needed(plan: SchedulePlan, p: int, actions: Sequence[Action], have: Counter[_Deed]) -> Iterator[_Deed]:
    """Everything that the ranks of a program must do once."""
    for module, pp in zip(plan.modules, plan.places[p], strict=True):
        use = plan.modules[module]
        if pp is None:
            continue
        for stage in use.stages_at(pp):
            starts = {
                a.microbatch for a in actions if (a.kind, a.module, a.stage) == (Kind.FORWARD, module, stage)
            }
            for i in range(plan.microbatches):
                yield from _of_stage(plan, module, stage, i, i in starts, have)
    for source in plan.sources:
        for i in range(plan.microbatches):
            if source in plan.active[i] and p in plan.ends(source)[0] | plan.ends(source)[1]:
                yield _Deed(Kind.BOUNDARY_FORWARD, source, 0, i)
                if plan.train and not plan.modules[source].frozen:
                    yield _Deed(Kind.BOUNDARY_BACKWARD, source, 0, i)


def _of_stage(
    plan: SchedulePlan, module: str, stage: int, i: int, starts: bool, have: Counter[_Deed]
) -> Iterator[_Deed]:
    """What one stage does for a micro-batch; `starts`: a computation begins with it, so its transfers do."""
    use, sink = plan.modules[module], module == plan.sink
    back = plan.needs_backward(i) if sink else plan.train and not use.frozen
    links = starts or sink
    if sink or module in plan.active[i]:
        yield _Deed(Kind.FORWARD, module, stage, i)
        halves = [_Deed(Kind.BACKWARD_INPUT, module, stage, i), _Deed(Kind.BACKWARD_WEIGHT, module, stage, i)]
        if back and any(have[half] for half in halves):
            yield from halves[: 1 if use.frozen else 2]
        elif back:
            yield _Deed(Kind.BACKWARD, module, stage, i)
    if links and stage:
        yield _Deed(Kind.RECV_FORWARD, module, stage, i)
        if back:
            yield _Deed(Kind.SEND_BACKWARD, module, stage, i)
    if links and stage + 1 < use.stages:
        yield _Deed(Kind.SEND_FORWARD, module, stage, i)
        if back:
            yield _Deed(Kind.RECV_BACKWARD, module, stage, i)


def _named(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """Actions that do not name the groups and the peer that they use."""
    compute = {m: compute_groups(m, u) for m, u in plan.modules.items()}
    parameters = {m: parameter_groups(m, u) for m, u in plan.modules.items()}
    for a in actions:
        if a.module not in plan.modules:
            continue  # not needed anywhere, which is reported
        wanted: tuple[str, ...] = ()
        way = _WAY[a.kind]
        peer = None
        if a.kind in COMPUTE:
            wanted = compute[a.module]
        elif a.kind in BOUNDARY:
            wanted = (f"edge.{a.module}.{way}",)
        elif a.kind in SENDS or a.kind in RECEIVES:
            wanted = (f"{a.module}.pp.{way}",)
            peer = a.stage + (1 if a.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD) else -1)
        elif a.kind in (Kind.GATHER, Kind.GRAD_SYNC):
            wanted = parameters[a.module]
        elif a.kind is Kind.OPTIMIZER:
            wanted = ("world",)
        if a.groups != wanted or a.peer != peer:
            yield (
                f"rank {plan.ranks_of[p][0]}: {a} names groups {list(a.groups)} and peer {a.peer}, needed: "
                f"{list(wanted)} and {peer}"
            )


_WAY = {kind: kind.value.split("_")[-1] for kind in Kind}
_STEPWISE = (Kind.GATHER, Kind.FREE, Kind.GRAD_SYNC, Kind.OPTIMIZER)


def _parameters(plan: SchedulePlan, p: int, actions: Sequence[Action]) -> Iterator[str]:
    """Parameters are there when used, gradients summed when whole, and once."""
    rank = plan.ranks_of[p][0]
    at: dict[tuple[str, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for k, a in enumerate(actions):
        if a.kind in COMPUTE:
            of = at[a.module, a.stage]
            of["use"].append(k)
            if a.kind is not Kind.FORWARD:
                of["back"].append(k)
        elif a.kind in _STEPWISE:
            at[a.module, a.stage][a.kind.value].append(k)
        if a.last:
            at[a.module, a.stage]["last"].append(k)
    for (module, stage), found in at.items():
        if found["last"] != found["back"][-1:]:
            marked = ", ".join(str(actions[k]) for k in found["last"]) or "none"
            final = actions[found["back"][-1]] if found["back"] else "none"
            yield f"rank {rank} marks {marked} as last of {module}.{stage}, which is {final}"
        if module not in plan.modules or not found["use"]:
            continue
        use, name = plan.modules[module], f"{module}.{stage}"
        first, end = found["use"][0], found["use"][-1]
        cut = bool(parameter_groups(module, use))
        wanted = {"gather": 0, "free": 0, "grad_sync": 0}
        if use.params == "step" and cut:
            wanted |= {"gather": 1, "free": 1}
        if use.params != "each" and cut and found["back"] and not use.frozen:
            wanted["grad_sync"] = 1
        for what, n in wanted.items():
            if len(found[what]) != n:
                yield f"rank {rank} does {what}({name}) {len(found[what])} times, needed: {n}"
        if found["gather"] and found["gather"][0] > first:
            yield f"rank {rank} does {actions[first]} before gather({name})"
        if found["free"] and found["free"][-1] < end:
            yield f"rank {rank} does {actions[end]} after free({name})"
        if found["grad_sync"] and found["back"] and found["grad_sync"][-1] < found["back"][-1]:
            yield f"rank {rank} does {actions[found['back'][-1]]} after grad_sync({name})"
    updates = [k for k, a in enumerate(actions) if a.kind is Kind.OPTIMIZER]
    if updates and updates != [len(actions) - 1]:
        yield f"rank {rank} does optimizer {len(updates)} times, needed: once, after everything"


def _transfers(plan: SchedulePlan) -> Iterator[str]:
    """Sends of one rank to another and receives there, in the same order."""
    sends: dict[tuple[int, str, int, str], list[Action]] = defaultdict(list)
    receives: dict[tuple[int, str, int, str], list[Action]] = defaultdict(list)
    for p, a in plan:
        if a.kind in SENDS or a.kind in RECEIVES:
            assert a.peer is not None
            way = _WAY[a.kind]
            table = sends if a.kind in SENDS else receives
            table[p, a.module, a.peer % plan.modules[a.module].layout.pp, way].append(a)
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
            for way in ("forward", "backward"):
                out, back = sends[p, module, j, way], receives[q, module, i, way]
                wrong = _differ([_message(a) for a in out], [_message(a) for a in back])
                if wrong is not None:
                    yield (
                        f"message {wrong} of rank {plan.ranks_of[p][0]} to rank {plan.ranks_of[q][0]}: "
                        f"{_nth(out, wrong)} meets {_nth(back, wrong)}"
                    )


def _collectives(plan: SchedulePlan) -> Iterator[str]:
    """The same order of collectives on all members of every process group."""
    seen: dict[str, dict[int, list[Action]]] = defaultdict(lambda: defaultdict(list))
    for p, a in plan:
        if a.kind not in SENDS and a.kind not in RECEIVES:
            for group in a.groups:
                seen[group][p].append(a)
    for group, of in seen.items():
        for members in plan.program_sets(group):
            first, *others = sorted(members)
            for p in others:
                wrong = _differ([_deed(a) for a in of[first]], [_deed(a) for a in of[p]])
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


def _deed(a: Action) -> tuple[Kind, str, int, int, int]:
    return (a.kind, a.module, a.stage, a.microbatch, a.span)


def _differ(a: Sequence[object], b: Sequence[object]) -> int | None:
    """The first index at which two sequences differ."""
    if a == b:
        return None
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nth(actions: Sequence[Action], k: int) -> str:
    return str(actions[k]) if k < len(actions) else "nothing"
