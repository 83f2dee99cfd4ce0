"""Handlers that carry out a plan without a model: computations sleep for the time of a cost model.

Transfers are real messages of one number each, so order and waiting are those of a real run. A plan and its
simulation can be tried in this way on more ranks than there are cores.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from parallel.schedule.action import COMPUTE, RECEIVES, SENDS, Action, Kind
from parallel.schedule.executor.execute import Handler, execute
from parallel.schedule.plan import SchedulePlan
from parallel.schedule.record import Record
from parallel.schedule.simulator.costs import Costs


def run_standins(plan: SchedulePlan, costs: Costs, unit: float = 1.0) -> list[Record]:
    """Carry out this rank's actions and return their records.

    All ranks of the default process group call this with equal arguments; ranks without a module only wait.

    unit: seconds of sleep for each second of `costs.compute`. Costs of transfers and of shared cores are
        ignored.
    """
    groups = _groups(plan)
    handlers = _StandIns(plan, costs, unit, groups)
    records: list[Record] = []
    dist.barrier()
    execute(plan.actions(dist.get_rank()), handlers.handlers, observe=records.append)
    for work in handlers.sent:
        work.wait()
    dist.barrier()
    for group in groups.values():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return records


def _groups(plan: SchedulePlan) -> dict[tuple[int, ...], Any]:
    """Process groups in which ranks of different programs meet, made in one order on all ranks."""
    names = sorted({g for _, a in plan if a.kind in COMPUTE for g in a.groups})
    wanted = {
        ranks for g in names for ranks in plan.instances(g) if len({plan.program_of[r] for r in ranks}) > 1
    }
    return {ranks: dist.new_group(sorted(ranks)) for ranks in sorted(wanted)}


class _StandIns:
    def __init__(
        self, plan: SchedulePlan, costs: Costs, unit: float, groups: Mapping[tuple[int, ...], Any]
    ) -> None:
        self.plan, self.costs, self.unit, self.groups = plan, costs, unit, groups
        self.rank = dist.get_rank()
        self.sent: list[Any] = []
        self.coming: dict[tuple[Kind, str, int, int], list[Any]] = {}  # receives, by what consumes them
        self.tensors: list[torch.Tensor] = []  # of messages under way
        ranks = plan.ranks_of
        self.ends = {
            (s, e): tuple(tuple(r for p in sorted(end) for r in ranks[p]) for end in plan.ends(s, e))
            for s in plan.sources
            for e in plan.modules[s].enters
        }
        self.handlers: dict[Kind, Handler] = dict.fromkeys(Kind, self.nothing)
        self.handlers.update(dict.fromkeys(COMPUTE, self.compute))
        self.handlers.update(dict.fromkeys(SENDS, self.send))
        self.handlers.update(dict.fromkeys(RECEIVES, self.receive))
        self.handlers[Kind.BOUNDARY_FORWARD] = self.handlers[Kind.BOUNDARY_BACKWARD] = self.boundary

    def nothing(self, action: Action) -> None:
        """For actions on parameters: there are none."""

    def compute(self, a: Action) -> float:
        for key in self._consumes(a):
            for work in self.coming.pop(key, ()):
                work.wait()
        for name in a.groups:
            group = self.groups.get(self.plan.members(name, self.rank))
            if group is not None:
                dist.barrier(group)
        ready = time.perf_counter()
        time.sleep(self.unit * self.costs.seconds(a))
        return ready

    def send(self, a: Action) -> None:
        self._isend(self._peer(a), a.tag)

    def receive(self, a: Action) -> None:
        self._irecv((a.kind, a.module, a.stage, a.microbatch), self._peer(a), a.tag)

    def boundary(self, a: Action) -> None:
        sources, targets = self.ends[a.module, a.stage]
        backward = a.kind is Kind.BOUNDARY_BACKWARD
        if backward:
            sources, targets = targets, sources
        edge = list(self.ends).index((a.module, a.stage))
        tag = (1 << 26) + (2 * edge + backward) * (1 << 16) + a.microbatch
        if self.rank in targets:
            for peer in sources:
                if peer != self.rank:
                    self._irecv((a.kind, a.module, a.stage, a.microbatch), peer, tag)
        if self.rank in sources:
            for peer in targets:
                if peer != self.rank:
                    self._isend(peer, tag)

    def _consumes(self, a: Action) -> list[tuple[Kind, str, int, int]]:
        """The receives of this rank that a computation waits for."""
        if a.kind is Kind.BACKWARD_WEIGHT:
            return []
        if a.kind is Kind.FORWARD:
            entering = self.plan.entering(a.stage) if a.module == self.plan.sink else ()
            rows = [(Kind.BOUNDARY_FORWARD, s, a.stage, i) for s in entering for i in a.microbatches]
            return [(Kind.RECV_FORWARD, a.module, a.stage, a.microbatch), *rows]
        enters = self.plan.modules[a.module].enters if a.module != self.plan.sink else ()
        rows = [(Kind.BOUNDARY_BACKWARD, a.module, s, i) for s in enters for i in a.microbatches]
        return [(Kind.RECV_BACKWARD, a.module, a.stage, a.microbatch), *rows]

    def _peer(self, a: Action) -> int:
        assert a.peer is not None
        layout = self.plan.modules[a.module].layout
        return layout.peers(self.rank, "pp")[a.peer % layout.pp]

    def _isend(self, peer: int, tag: int) -> None:
        self.tensors.append(torch.zeros(1))
        self.sent.append(dist.isend(self.tensors[-1], peer, tag=tag))

    def _irecv(self, key: tuple[Kind, str, int, int], peer: int, tag: int) -> None:
        self.tensors.append(torch.zeros(1))
        self.coming.setdefault(key, []).append(dist.irecv(self.tensors[-1], peer, tag=tag))
