"""The first use of every communicator, at start-up and in one order.

A first collective, and a first message between two ranks in a direction, make a connection, for which the
hosts of both sides wait (NCCL). During a step hosts come to them in the order of their own work, and may wait
for each other in a ring. Here all ranks go through the names of the plan in its order, and none leaves a
group before its use is done; so no ring is possible.

A group is used as its work will use it: every group does an all-reduce; expert axes, and edges where rows
travel by collectives, an all-to-all; and groups with messages between two ranks exchange one in each
direction that is needed, in rounds. In a round a rank sends to one rank at most and receives from one at
most. Both ends of a message put it in the same batch, which has at most 2 x ROUNDS messages.

    what            round                           rounds
    a pipeline      r to r + 1, backward r to r - 1 1; the last rank's to the first is for virtual stages
    context axis    r to r + i                      size - 1
    edge            source s to sink s + i          the larger side, at most PEERS

Beyond PEERS rounds a large edge is left to its first transfers: every pair of 1,024 ranks would be more
connections than a job needs. Both ends of such a pair take part in the same transfer. This only matters for
point-to-point edges on devices; the transport there is an all-to-all unless chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.topology.groups import Group, Ranks
from parallel.topology.process_groups import Groups

ROUNDS = 16  # in one batch
PEERS = 64  # rounds of an edge that are connected at start-up


class Ends(NamedTuple):
    """The ranks at the two ends of an edge, each in mesh order."""

    source: Ranks
    sink: Ranks


class Round(NamedTuple):
    """Whom a rank sends to and receives from, at most one each; itself is left out."""

    to: int | None
    source: int | None


def warm_up(
    groups: Groups,
    device: torch.device,
    edges: Mapping[tuple[str, int], Ends] | None = None,
    *,
    node_size: int | None = None,
) -> None:
    """Use each of a rank's groups once; every rank calls this, before it uses any of them.

    edges: by (source, stage of the sink), the ends of each edge in the plan. node_size: ranks a node, where
    rows take two hops. Raises RuntimeError naming a group, and the ranks that have not come to it within the
    groups' timeout.
    """
    together = device.type != "cpu"  # how rows of edges travel there
    used: set[dist.ProcessGroup] = set()
    for name, ranks in groups:
        group = groups[name]
        with groups.roll.call("used", str(name), ranks, groups.timeout_s):
            limit = timedelta(seconds=groups.timeout_s)
            x = torch.zeros(len(ranks), device=device)
            if group not in used:
                _wait(dist.all_reduce(x[:1], group=group, async_op=True), limit)
                used.add(group)
            if name.axis in ("ep", "etp") or (name.scope == "edge" and together):
                y = torch.empty_like(x)
                _wait(dist.all_to_all_single(y, x, group=group, async_op=True), limit)
            else:
                ends = (edges or {}).get((name.module, name.stage)) if name.scope == "edge" else None
                _exchange(rounds(name, ranks, groups.rank, ends, node_size), group, device, limit)


def rounds(
    name: Group, ranks: Ranks, rank: int, ends: Ends | None = None, node_size: int | None = None
) -> Iterator[Round]:
    """The rounds of `rank` in a group, one after another. Pure.

    Where a rank sends to another in round i, the other receives from it in its round i.
    """
    if name.axis == "pp":
        way = 1 if name.direction == "forward" else -1
        yield from _shifts(ranks, rank, (way,))
    elif name.axis == "cp":
        yield from _shifts(ranks, rank, range(1, len(ranks)))
    elif ends is not None:
        source, sink = ends if name.direction == "forward" else (ends.sink, ends.source)
        yield from islice(_across(source, sink, rank), PEERS)
        if node_size is not None and rank in sink:  # the second hop
            near = tuple(r for r in sink if r // node_size == rank // node_size)
            yield from _shifts(near, rank, range(1, len(near)))


def _shifts(ranks: Ranks, rank: int, by: range | tuple[int, ...]) -> Iterator[Round]:
    """Every rank sends to the one `by` places further, in turn."""
    at, n = ranks.index(rank), len(ranks)
    return (Round(ranks[(at + i) % n], ranks[(at - i) % n]) for i in by)


def _across(source: Ranks, sink: Ranks, rank: int) -> Iterator[Round]:
    """Every source sends to every sink. As many sources as there are sinks are a block; blocks take turns."""
    n, m = len(source), len(sink)
    s = source.index(rank) if rank in source else None
    j = sink.index(rank) if rank in sink else None
    for block in range(-(-n // m)):
        for i in range(m):
            to = sink[(s + i) % m] if s is not None and s // m == block else None
            at = block * m + (j - i) % m if j is not None else n
            came = source[at] if at < n else None
            yield Round(None if to == rank else to, None if came == rank else came)


def _exchange(
    every: Iterator[Round], group: dist.ProcessGroup, device: torch.device, limit: timedelta
) -> None:
    while batch := list(islice(every, ROUNDS)):
        ops = []
        for to, source in batch:
            if source is not None:
                ops.append(dist.P2POp(dist.irecv, torch.empty(1, device=device), source, group))
            if to is not None:
                ops.append(dist.P2POp(dist.isend, torch.zeros(1, device=device), to, group))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            _wait(work, limit)


def _wait(work: dist.Work | None, limit: timedelta) -> None:
    """The host waits: nothing else is under way yet, and a rank that is missing is named in time."""
    assert work is not None, "a rank uses groups that it is in"
    work.wait(limit)
