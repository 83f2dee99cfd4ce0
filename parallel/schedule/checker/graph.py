"""What waits for what when a plan is carried out, for the checker and the simulator. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.schedule.action import SEND_FORWARD, ActionKey
from parallel.schedule.checker.order import Stuck, find_order
from parallel.schedule.checker.reader import Flow, Reading, TransferKey, reading_of
from parallel.schedule.checker.release import WINDOWS, place_releases
from parallel.schedule.plan import SchedulePlan


@dataclass(frozen=True)
class Graph:
    """The computations of a plan and the transfers between them.

    A computation is, here, every action that does not only start a transfer. Actions are numbered through all
    programs; the number START stands for the start of the step.

    first: the number of each program's first action, then how many actions there are.
    before: by action, the last computation before it on its ranks, or START.
    waits: by computation, the transfers that it waits for, those in `released` included.
    released: by computation, the transfers whose memory its ranks release before it.
    transfers: by transfer, for each of its ends the last computation before that end is started.
    flows: by number.
    second: by forward of a pair, its backward, which waits for nothing of its own.
    order: the computations in an order in which they can be done. Those that begin together, because their
        collectives meet or they are a pair, are one entry.
    """

    first: tuple[int, ...]
    before: list[int]
    waits: dict[int, list[TransferKey]]
    released: dict[int, list[TransferKey]]
    transfers: dict[TransferKey, list[int]]
    flows: list[Flow]
    second: dict[int, int]
    order: list[tuple[int, ...]]


def graph_of(plan: SchedulePlan) -> Graph:
    """The graph of a plan, worked out once. Linear in its actions. Raises Stuck where it cannot finish."""
    if "graph" not in plan.memo:
        plan.memo["graph"] = _make_graph(plan, reading_of(plan))
    found: Graph = plan.memo["graph"]
    return found


def _make_graph(plan: SchedulePlan, reading: Reading) -> Graph:
    for window in (*WINDOWS, None):
        found = place_releases(reading, window or 0)
        # Ranks that wait for each other's transfers in a ring need more of them under way. The last resort is
        # to wait for none that may block.
        released = found.acknowledged if window is None else _joined(found.acknowledged, found.blocking)
        waits = _joined(reading.waits, released)
        try:
            order = find_order(plan, reading, waits)
        except Stuck:
            if window is None or not found.blocking:
                raise
            continue
        return Graph(
            first=reading.first,
            before=reading.before,
            waits=waits,
            released=released,
            transfers=reading.transfers,
            flows=reading.flows,
            second=reading.second,
            order=order,
        )
    raise AssertionError("unreachable")


def _joined(
    a: Mapping[int, list[TransferKey]], b: Mapping[int, list[TransferKey]]
) -> dict[int, list[TransferKey]]:
    return {**a, **{n: [*a.get(n, ()), *keys] for n, keys in b.items()}}


def releases(plan: SchedulePlan, p: int) -> dict[ActionKey, list[ActionKey]]:
    """By computation of program p, the sends and boundaries whose memory its ranks release before it.

    A rank waits there until their rows have left. Other transfers are waited for by the computation that
    reads their result, or after the last action.
    """
    graph, actions, found = graph_of(plan), plan.programs[p], dict[ActionKey, ActionKey]()
    for n in range(graph.first[p], graph.first[p + 1]):
        for flow, microbatch in graph.released.get(n, ()):  # of several peers' the last counts
            found[_sent(graph.flows[flow], microbatch)] = actions[n - graph.first[p]][:4]
    out: dict[ActionKey, list[ActionKey]] = {}
    for sent, computation in found.items():
        out.setdefault(computation, []).append(sent)
    return out


def _sent(flow: Flow, microbatch: int) -> ActionKey:
    """The action that starts a transfer where its rows come from."""
    return flow.kind, flow.module, microbatch, flow.stage - (flow.kind is SEND_FORWARD)
