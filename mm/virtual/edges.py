"""Rows over the edges of a job at size: all ranks' plans against each other, and against what code sent.

Which rows go where differs even among ranks of one kind. So each rank's part is planned by the code that
plans it in the job, and each hop of each transfer is compared: what one rank sends another expects. That the
code sends what is planned is seen on every rank that was traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import Edge, StepPlan
from mm.ranks.job import assembler_of
from mm.ranks.launch import RankInfo
from mm.virtual.records import Trace
from parallel.boundary.plan import EdgePlan, Transfer
from parallel.comm.transport import Messages
from parallel.schedule import Kind
from parallel.sequence.intervals import count

_Rows = dict[int, int]  # by peer, a global rank


class Hop(NamedTuple):
    """What a rank exchanges with others in one call: rows by peer, without those that stay here."""

    sends: _Rows
    receives: _Rows


Calls = dict[tuple[Edge, str], list[Hop]]  # by edge and direction, in the order of the rank's actions


def edge_problems(blueprint: Blueprint, plan: StepPlan, traces: Sequence[Trace]) -> list[str]:
    """What does not fit: at most one line for each of the two comparisons."""
    calls = planned(blueprint, plan)
    return [*_unmet(calls), *_unlike(blueprint, calls, traces)]


def planned(blueprint: Blueprint, plan: StepPlan) -> dict[int, Calls]:
    """By rank, the hops that its schedule and its part of the step's plan have it make."""
    schedule, out = blueprint.schedule(plan.active), {}
    ends = {r for layout in blueprint.layouts.values() for r in layout.ranks}
    for rank in sorted(ends):
        info = RankInfo(rank, blueprint.world, torch.device("cpu"), node_size=blueprint.node_size)
        boundary = assembler_of(blueprint, info, {}).boundary(plan)
        calls: Calls = {}
        for action in schedule.actions(rank):
            if action.kind in (Kind.BOUNDARY_FORWARD, Kind.BOUNDARY_BACKWARD):
                edge = Edge(action.module, action.stage)
                way = "forward" if action.kind is Kind.BOUNDARY_FORWARD else "backward"
                own = boundary[action.microbatch].edges[edge]
                calls.setdefault((edge, way), []).extend(_hops(own, way))
        out[rank] = calls
    return out


def _hops(plan: EdgePlan, way: str) -> Iterator[Hop]:
    transfers: tuple[Transfer, ...] = (plan.forward,) if way == "forward" else plan.backward
    for t in transfers:
        if t.moves:
            yield Hop(_rows(t.sends), _rows(t.recvs))
            if t.relay is not None:
                yield Hop(_rows(t.relay.sends), _rows(t.relay.recvs))


def _rows(messages: Messages) -> _Rows:
    return {m.peer: n for m in messages if (n := count(m.rows))}


def _unmet(calls: dict[int, Calls]) -> list[str]:
    """The first message of which one end plans other rows than the other."""
    sent: dict[tuple[Edge, str, int, int, int], int] = {}
    for rank, own in calls.items():
        for (edge, way), hops in own.items():
            for k, hop in enumerate(hops):
                sent.update({(edge, way, k, rank, peer): n for peer, n in hop.sends.items()})
    for rank, own in calls.items():
        for (edge, way), hops in own.items():
            for k, hop in enumerate(hops):
                for peer, n in hop.receives.items():
                    given = sent.pop((edge, way, k, peer, rank), 0)
                    if given != n:
                        return [_said(edge, way, k, (peer, given), (rank, n))]
    for (edge, way, k, rank, peer), n in sent.items():
        return [_said(edge, way, k, (rank, n), (peer, 0))]
    return []


def _said(edge: Edge, way: str, k: int, sender: tuple[int, int], reader: tuple[int, int]) -> str:
    return (
        f"edge of {edge.source}, {way}, hop {k}: rank {sender[0]} plans to send {sender[1]} rows to rank "
        f"{reader[0]}, which plans to receive {reader[1]}"
    )


def _unlike(blueprint: Blueprint, calls: dict[int, Calls], traces: Sequence[Trace]) -> list[str]:
    """The first traced call over an edge that is not what the rank's plan has."""
    sizes = {e: prod(blueprint.entry_shape(e)) * blueprint.dtype.itemsize for e in blueprint.edges}
    for trace in traces:
        groups = {}
        for name in blueprint.groups.of_rank(trace.rank):
            if name.scope == "edge":
                groups[Edge(name.module, name.stage), name.direction] = str(name)
        for key, group in groups.items():
            members, row = _members(trace, group), sizes[key[0]]
            wanted = [
                tuple(tuple(side.get(r, 0) * row for r in members) for side in hop)
                for hop in calls[trace.rank].get(key, [])
            ]
            found = [(c.sends, c.receives) for c in trace.calls if group in c.group.split("=")]
            if found != wanted:
                k = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), "")
                return [
                    f"{group}: rank {trace.rank} makes {len(found)} calls where its plan has {len(wanted)}, "
                    f"or other rows move in call {k}"
                ]
    return []


def _members(trace: Trace, group: str) -> tuple[int, ...]:
    return next((c.members for c in trace.calls if group in c.group.split("=")), ())
