"""Handlers that carry out a plan without a model: computations sleep for the time of a cost model.

Transfers are real messages of one number each, in the groups that the plan names, so order and waiting are
those of a real run. The number is when the transfer was started: its reader waits until the link would have
brought it, by the cost model. Gathers and sums of gradients are reductions to the last moment at which a data
rank has started them. A plan and its simulation can be tried in this way on more ranks than there are cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.schedule.action import BOUNDARY, COMPUTE, RECEIVES, SENDS, Action, ActionKey, Kind
from parallel.schedule.checker.graph import releases
from parallel.schedule.executor.exchanging import Exchanging
from parallel.schedule.executor.execute import Handler, execute
from parallel.schedule.plan import SchedulePlan, parameter_groups
from parallel.schedule.record import Record
from parallel.schedule.simulator.costs import Costs
from parallel.schedule.simulator.traffic import with_traffic
from parallel.topology.groups import Group

_Key = tuple[str, tuple[int, ...]]  # of a process group: its lane and its ranks


def run_standins(
    plan: SchedulePlan, costs: Costs, unit: float = 1.0, *, begin: Callable[[], object] = dist.barrier
) -> list[Record]:
    """Carry out this rank's actions and return their records.

    All ranks of the default process group call this with equal arguments; ranks without a module only wait.

    unit: seconds of sleep for each second of `costs`. Shared cores are ignored. Ranks of several machines
        need clocks that agree.
    begin: called on all ranks before the first action, when all groups are made.
    """
    groups = _groups(plan, exchanging=bool(costs.exchange))
    handlers = _StandIns(plan, costs, unit, groups)
    records: list[Record] = []
    begin()
    together = handlers.exchanging.turns.run
    execute(plan.actions(dist.get_rank()), handlers.handlers, observe=records.append, together=together)
    handlers.finish()
    dist.barrier()
    for group in groups.values():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return records


def _groups(plan: SchedulePlan, *, exchanging: bool) -> dict[_Key, Any]:
    """The process groups of a plan, made in one order on all ranks: of messages, of gathers and sums, and of
    collectives in which ranks of different programs meet. Ranks of one program sleep alike: their other
    collectives are left out, but for expert exchanges where these take time.
    """
    wanted = {
        (group.lane, ranks)
        for group in {g for _, a in plan for g in a.groups}
        for ranks in plan.instances(group)
        if len(ranks) > 1
        and (
            group.direction
            or group.lane == "parameters"
            or (exchanging and group.axis == "ep")
            or _differ(plan, ranks)
        )
    }
    return {key: dist.new_group(sorted(key[1]), group_desc=key[0]) for key in sorted(wanted)}


def _differ(plan: SchedulePlan, ranks: Sequence[int]) -> bool:
    """Whether ranks run different programs."""
    return len({plan.program_of[r] for r in ranks}) > 1


def _traffic(plan: SchedulePlan, program: int, costs: Costs) -> dict[ActionKey, float]:
    """By computation of a program, what the gathers and sums in it add."""
    actions = plan.programs[program]
    alone = [costs.seconds(a) for a in actions]
    both = with_traffic(alone, plan, actions, costs)
    return {a[:4]: took - own for a, took, own in zip(actions, both, alone, strict=True) if a.kind in COMPUTE}


class _Coming(NamedTuple):
    """A transfer that this rank reads.

    stamps: when others started it, once it has come. started: when this rank did. seconds: how long it takes
    from when all have.
    """

    works: list[dist.Work]
    stamps: list[torch.Tensor]
    started: float
    seconds: float

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        there = max([self.started, *(float(stamp) for stamp in self.stamps)]) + self.seconds
        time.sleep(max(0.0, there - time.monotonic()))


class _StandIns:
    def __init__(self, plan: SchedulePlan, costs: Costs, unit: float, groups: Mapping[_Key, Any]) -> None:
        self.plan, self.costs, self.unit, self.groups = plan, costs, unit, groups
        self.rank = dist.get_rank()
        self.sent: dict[ActionKey, list[dist.Work]] = {}  # by what started them
        self.coming: dict[ActionKey, _Coming] = {}  # by what started them
        self.gathers: dict[tuple[str, int], _Coming] = {}  # by stage, until it computes
        self.sums: list[_Coming] = []
        self.tensors: list[torch.Tensor] = []  # of messages
        self.exchanging = Exchanging(unit)
        program = plan.program_of.get(self.rank)
        self.released = {} if program is None else releases(plan, program)
        self.traffic = {} if program is None else _traffic(plan, program, costs)
        actions = plan.actions(self.rank)
        self.late = {a[1:4] for a in actions if a.kind is Kind.GRAD_SYNC}
        ranks = plan.ranks_of
        self.ends = {
            (s, e): tuple(tuple(r for p in sorted(end) for r in ranks[p]) for end in plan.ends(s, e))
            for s in plan.sources
            for e in plan.modules[s].enters
        }
        self.handlers: dict[Kind, Handler] = dict.fromkeys(Kind, self.meet)
        self.handlers.update(dict.fromkeys(COMPUTE, self.compute))
        self.handlers.update(dict.fromkeys(SENDS | RECEIVES, self.message))
        self.handlers.update(dict.fromkeys(BOUNDARY, self.boundary))
        self.handlers[Kind.GATHER] = self.gather
        self.handlers[Kind.GRAD_SYNC] = self.grad_sync
        self.handlers[Kind.OPTIMIZER] = self.optimizer

    def meet(self, a: Action) -> None:
        """The collectives of an action in which ranks of different programs meet."""
        for name in a.groups:
            group = self._group(name)
            if group is not None and _differ(self.plan, self.plan.members(name, self.rank)):
                dist.barrier(group)

    def gather(self, a: Action) -> None:
        """Start a stage's gather, which its first computation waits for."""
        self.gathers[a.module, a.stage] = self._reduce(a.groups, self._priced(a.module, a.kind))

    def grad_sync(self, a: Action) -> None:
        """Start the sum of a stage's gradients, which the end of the step waits for."""
        self.sums.append(self._reduce(a.groups, self._priced(a.module, a.kind)))

    def optimizer(self, a: Action) -> None:
        """Wait for the sums, then for everyone."""
        self._wait_for_sums()
        self.meet(a)

    def compute(self, a: Action) -> float:
        for key in self.released.get(a[:4], ()):
            for work in self.sent.pop(key, ()):
                work.wait()
        for key in self._consumes(a):
            if key in self.coming:
                self.coming.pop(key).wait()
        if (a.module, a.stage) in self.gathers:
            self.gathers.pop((a.module, a.stage)).wait()
        self.meet(a)
        ready = time.perf_counter()
        time.sleep(self.unit * self.traffic[a[:4]])
        experts = next((self._group(g) for g in a.groups if g.axis == "ep"), None)
        self.exchanging.compute(self.costs.turns(a), experts)
        use = self.plan.modules[a.module]
        if a.last and use.sums_in(a.kind, a.last) and (a.module, 0, a.stage) not in self.late:
            groups = parameter_groups(a.module, use)
            self.sums.append(self._reduce(groups, self.costs.beyond(a, Kind.GRAD_SYNC)))
        return ready

    def message(self, a: Action) -> None:
        """A send or receive along a pipeline."""
        assert a.peer is not None
        layout = self.plan.modules[a.module].layout
        peer = layout.peers(self.rank, "pp")[a.peer % layout.pp]
        sends, stamp = a.kind in SENDS, self._stamp()
        work = (dist.isend if sends else dist.irecv)(stamp, peer, group=self._group(a.groups[0]), tag=a.tag)
        assert work is not None, "a rank is in the groups of its messages"
        if sends:
            self.sent[a[:4]] = [work]
            return
        kind = Kind.SEND_FORWARD if a.kind is Kind.RECV_FORWARD else Kind.SEND_BACKWARD
        self.coming[a[:4]] = self._coming([work], [stamp], a.module, kind)

    def boundary(self, a: Action) -> None:
        """The messages of a boundary: from every rank that makes rows to every other one that reads them."""
        sources, targets = self.ends[a.module, a.stage]
        if a.kind is Kind.BOUNDARY_BACKWARD:
            sources, targets = targets, sources
        recvs = [r for r in sources if self.rank in targets and r != self.rank]
        sends = [r for r in targets if self.rank in sources and r != self.rank]
        group, tag = self._group(a.groups[0]), a.microbatch
        stamps = [self._stamp() for _ in recvs]
        ops = [dist.P2POp(dist.irecv, x, peer, group, tag) for x, peer in zip(stamps, recvs, strict=True)]
        ops += [dist.P2POp(dist.isend, self._stamp(), peer, group, tag) for peer in sends]
        works = dist.batch_isend_irecv(ops) if ops else []
        # One handle of a whole batch, where the backend has that, is waited for by both.
        single = len(works) == len(ops)
        if recvs:
            self.coming[a[:4]] = self._coming(
                works[: len(recvs)] if single else works, stamps, a.module, a.kind
            )
        self.sent[a[:4]] = works[len(recvs) :] if single else works

    def _coming(self, works: list[dist.Work], stamps: list[torch.Tensor], module: str, kind: Kind) -> _Coming:
        return _Coming(works, stamps, time.monotonic(), self.unit * self._priced(module, kind))

    def _priced(self, module: str, kind: Kind) -> float:
        return self.costs.transfer.get((module, kind), 0.0)

    def finish(self) -> None:
        """Wait for what is still under way after the last action."""
        self.exchanging.turns.close()
        self._wait_for_sums()
        for coming in self.coming.values():
            coming.wait()
        for work in [work for works in self.sent.values() for work in works]:
            work.wait()

    def _wait_for_sums(self) -> None:
        for coming in self.sums:
            coming.wait()
        self.sums.clear()

    def _reduce(self, groups: Sequence[Group], seconds: float) -> _Coming:
        """A collective of all members of these groups; it is there some seconds after the last has come."""
        stamps, works = [], []
        for name in groups:
            group = self._group(name)
            if group is not None:
                stamps.append(self._stamp())
                works.append(dist.all_reduce(stamps[-1], dist.ReduceOp.MAX, group, async_op=True))
        return _Coming(works, stamps, time.monotonic(), self.unit * seconds)

    def _consumes(self, a: Action) -> list[ActionKey]:
        """The receives of this rank that a computation waits for."""
        if a.kind is Kind.BACKWARD_WEIGHT:
            return []
        if a.kind is Kind.FORWARD:
            entering = self.plan.entering(a.stage) if a.module == self.plan.sink else ()
            rows = [(Kind.BOUNDARY_FORWARD, s, i, a.stage) for s in entering for i in a.microbatches]
            return [(Kind.RECV_FORWARD, a.module, a.microbatch, a.stage), *rows]
        enters = self.plan.modules[a.module].enters if a.module != self.plan.sink else ()
        rows = [(Kind.BOUNDARY_BACKWARD, a.module, i, s) for s in enters for i in a.microbatches]
        return [(Kind.RECV_BACKWARD, a.module, a.microbatch, a.stage), *rows]

    def _group(self, name: Group) -> Any:
        """The process group of a name that this rank is in; None where the run has none."""
        return self.groups.get((name.lane, self.plan.members(name, self.rank)))

    def _stamp(self) -> torch.Tensor:
        """Now. It lives until the end of the run, since a message may still be under way."""
        self.tensors.append(torch.tensor([time.monotonic()], dtype=torch.float64))
        return self.tensors[-1]
