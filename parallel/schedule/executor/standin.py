"""Handlers that carry out a plan without a model: computations sleep for the time of a cost model.

Transfers are real messages of one number each, in the groups that the plan names, so order and waiting are
those of a real run. A plan and its simulation can be tried in this way on more ranks than there are cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from parallel.schedule.action import BOUNDARY, COMPUTE, RECEIVES, SENDS, Action, ActionKey, Kind
from parallel.schedule.checker.graph import releases
from parallel.schedule.executor.execute import Handler, execute
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.costs import Costs
from parallel.topology.groups import Group

_Key = tuple[str, tuple[int, ...]]  # of a process group: its lane and its ranks


def run_standins(
    plan: SchedulePlan, costs: Costs, unit: float = 1.0, *, begin: Callable[[], object] = dist.barrier
) -> list[Record]:
    """Carry out this rank's actions and return their records.

    All ranks of the default process group call this with equal arguments; ranks without a module only wait.

    unit: seconds of sleep for each second of `costs.compute`. Costs of transfers and of shared cores are
        ignored.
    begin: called on all ranks before the first action, when all groups are made.
    """
    groups = _groups(plan)
    handlers = _StandIns(plan, costs, unit, groups)
    records: list[Record] = []
    begin()
    execute(plan.actions(dist.get_rank()), handlers.handlers, observe=records.append)
    handlers.finish()
    dist.barrier()
    for group in groups.values():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return records


def _groups(plan: SchedulePlan) -> dict[_Key, Any]:
    """The process groups of a plan, made in one order on all ranks: those of messages, and of collectives in
    which ranks of different programs meet. Ranks of one program sleep alike: their collectives are left out.
    """
    wanted = {
        (group.lane, ranks)
        for group in {g for _, a in plan for g in a.groups}
        for ranks in plan.instances(group)
        if (group.direction and len(ranks) > 1) or len({plan.program_of[r] for r in ranks}) > 1
    }
    return {key: dist.new_group(sorted(key[1]), group_desc=key[0]) for key in sorted(wanted)}


class _StandIns:
    def __init__(self, plan: SchedulePlan, costs: Costs, unit: float, groups: Mapping[_Key, Any]) -> None:
        self.plan, self.costs, self.unit, self.groups = plan, costs, unit, groups
        self.rank = dist.get_rank()
        self.sent: dict[ActionKey, list[dist.Work]] = {}  # by what started them
        self.coming: dict[ActionKey, list[dist.Work]] = {}  # receives, by what started them
        self.tensors: list[torch.Tensor] = []  # of messages under way
        program = plan.program_of.get(self.rank)
        self.released = {} if program is None else releases(plan, program)
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

    def meet(self, a: Action) -> None:
        """The collectives of an action."""
        for name in a.groups:
            group = self._group(name)
            if group is not None:
                dist.barrier(group)

    def compute(self, a: Action) -> float:
        for key in self.released.get(a[:4], ()):
            for work in self.sent.pop(key, ()):
                work.wait()
        for key in self._consumes(a):
            for work in self.coming.pop(key, ()):
                work.wait()
        self.meet(a)
        ready = time.perf_counter()
        time.sleep(self.unit * self.costs.seconds(a))
        return ready

    def message(self, a: Action) -> None:
        """A send or receive along a pipeline."""
        assert a.peer is not None
        layout = self.plan.modules[a.module].layout
        peer = layout.peers(self.rank, "pp")[a.peer % layout.pp]
        start, table = (dist.isend, self.sent) if a.kind in SENDS else (dist.irecv, self.coming)
        work = start(self._tensor(), peer, group=self._group(a.groups[0]), tag=a.tag)
        assert work is not None, "a rank is in the groups of its messages"
        table[a[:4]] = [work]

    def boundary(self, a: Action) -> None:
        """The messages of a boundary: from every rank that makes rows to every other one that reads them."""
        sources, targets = self.ends[a.module, a.stage]
        if a.kind is Kind.BOUNDARY_BACKWARD:
            sources, targets = targets, sources
        recvs = [r for r in sources if self.rank in targets and r != self.rank]
        sends = [r for r in targets if self.rank in sources and r != self.rank]
        group, tag = self._group(a.groups[0]), a.microbatch
        ops = [dist.P2POp(dist.irecv, self._tensor(), peer, group, tag) for peer in recvs]
        ops += [dist.P2POp(dist.isend, self._tensor(), peer, group, tag) for peer in sends]
        works = dist.batch_isend_irecv(ops) if ops else []
        # One handle of a whole batch, where the backend has that, is waited for by both.
        single = len(works) == len(ops)
        self.coming[a[:4]] = works[: len(recvs)] if single else works
        self.sent[a[:4]] = works[len(recvs) :] if single else works

    def finish(self) -> None:
        """Wait for what is still under way after the last action."""
        for work in [w for table in (self.coming, self.sent) for works in table.values() for w in works]:
            work.wait()

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
        """The process group of a name that this rank is in; None where its ranks all run one program."""
        return self.groups.get((name.lane, self.plan.members(name, self.rank)))

    def _tensor(self) -> torch.Tensor:
        self.tensors.append(torch.zeros(1))
        return self.tensors[-1]
