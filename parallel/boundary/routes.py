"""Which rank sends which rows to which other, computed from the two row maps alone. Pure.

Both ends of every message compute the same table of requests, so nothing is agreed at run time (law 4).

An example of four ranks and eight global rows. Ranks 0 and 1 are replicas: one lane, whose ranks both hold
rows 0-5. Rank 2 holds rows 6-7. Rank 1 wants rows 4-7, and rank 3 wants rows 0-3.

>>> have = RowMap.of_runs([(0, 1), (2,)], start=[0, 6], length=[6, 2], lane=[0, 1])
>>> want = RowMap.of_runs([(1,), (3,)], start=[4, 0], length=[4, 4], lane=[0, 1])

The routes, in global rows:

    rank   holds   wants   keeps   sends             receives
    0      0-5     -       -       0-1 to rank 3     -
    1      0-5     4-7     4-5     2-3 to rank 3     6-7 from rank 2
    2      6-7     -       -       6-7 to rank 1     -
    3      -       0-3     -       -                 0-1 from rank 0, 2-3 from rank 1

Rank 1 keeps what it holds already. Rank 3 is the only reader of its rows and two replicas hold them, so each
of the two sends a half. Routes name local rows: rows of the input for what is kept or sent, rows of the
output for what is received.

>>> for rank in range(4):
...     routes = direct(have, want, rank)
...     print(rank, "sends", routes.sends, "receives", routes.recvs)
0 sends [Message(peer=3, rows=slice(0, 2, None))] receives []
1 sends [Message(peer=3, rows=slice(2, 4, None))] receives [Message(peer=2, rows=slice(2, 4, None))]
2 sends [Message(peer=1, rows=slice(0, 2, None))] receives []
3 sends [] receives [Message(peer=0, rows=slice(0, 2, None)), Message(peer=1, rows=slice(2, 4, None))]
>>> direct(have, want, 1).keep  # global rows 4-5
Kept(source=slice(4, 6, None), dest=slice(0, 2, None))

With more readers than replicas the replicas take turns instead: of three readers, ranks 3, 4 and 5, rank 0
serves the first and the third.

>>> want = RowMap.of_runs([(3, 4, 5)], start=[0], length=[4], lane=[0])
>>> [message.peer for message in direct(have, want, 0).sends]
[3, 5]
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from parallel.boundary.rows import RowMap
from parallel.boundary.runs import Runs, each_row_once, indices_of
from parallel.comm.transport import Message
from parallel.sequence.intervals import (
    Column,
    Rows,
    before,
    meet,
    outside,
    repeat_groups,
    rows_of_each,
    share_start,
    sums,
)


class Kept(NamedTuple):
    """Rows that stay on a rank. source: local rows of the input; dest: where they go in the output."""

    source: Rows
    dest: Rows


@dataclass(frozen=True)
class Routes:
    """One rank's part of a hop: what it keeps, sends (rows of the input) and receives (rows of the output).

    One message a peer, with its rows in ascending order of global row.
    """

    keep: Kept
    sends: list[Message]
    recvs: list[Message]


@dataclass(frozen=True)
class Requests:
    """Ranks that lack rows, and the lane of `have` that serves them: a table, a line a (lane, reader).

    The order is that of lane, then of the reader among the members of `want`: equal on every rank.

    The ranks of the lane are replicas, which take turns. A reader's rows are split into `shares` consecutive
    shares, more than one only where the lane has more replicas than readers. Share number s is sent by the
    lane's replica number (first_turn + s) % replicas. first_replica: index of replica number 0 in
    _replicas(). reader_lane: the reader's lane in `want`.
    """

    lane: Column
    reader: Column
    reader_lane: Column
    first_replica: Column
    replicas: Column
    shares: Column
    first_turn: Column

    def take(self, which: Column) -> Requests:
        """The requests with these indices, in this order."""
        return Requests(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    def sender_of(self, request: Column, share: Column) -> Column:
        """Index in _replicas() of the rank that sends share number share[k] of request[k]."""
        turn = self.first_turn[request] + share
        return self.first_replica[request] + turn % self.replicas[request]


class Stretches(NamedTuple):
    """Consecutive local rows, a line a stretch: length[i] rows from local[i] on, of group[i]. In order of
    group, which is a request, a lane or a cell."""

    group: Column
    local: Column
    length: Column


class Shares(NamedTuple):
    """Shares of groups of rows, a line a share: share number[k] of group[k]. of: by group, into how many
    equal shares its rows are split."""

    group: Column
    number: Column
    of: Column

    @staticmethod
    def all(of: Column) -> Shares:
        """All shares of all groups."""
        return Shares(*repeat_groups(np.zeros_like(of), of), of)


class Part(NamedTuple):
    """What stretches have in common with shares, a line a pair of them: length[i] rows from local[i] on, of
    stretch[i] and share[i]."""

    stretch: Column
    share: Column
    local: Column
    length: Column


class Own(NamedTuple):
    """The ranks that plan, each its own part: one, or one in each of several maps that are stacked as one.

    rank: as the maps number them, ascending. base: by rank, what to subtract from numbers of its map to get
    global ranks: 0 where maps are not stacked.
    """

    rank: Column
    base: Column

    @staticmethod
    def alone(rank: int) -> Own:
        """A rank in a map that is not stacked."""
        return Own(np.asarray([rank]), np.zeros(1, dtype=np.int64))


def direct(have: RowMap, want: RowMap, rank: int) -> Routes:
    """The part of `rank` in bringing every rank of `want` the rows that it lacks, each in one hop.

    A row that several lanes of `have` hold is sent by one of them. Rows that no rank has are left out.
    """
    return direct_all(have, want, Own.alone(rank))[0]


def direct_all(have: RowMap, want: RowMap, own: Own) -> list[Routes]:
    """direct() of each of these ranks."""
    offers = offers_of(have)
    kept, recvs = _receive(have, want, offers, own)
    sends = _send(have, want, offers, own)
    return [Routes(*parts) for parts in zip(kept, sends, recvs, strict=True)]


def offers_of(have: RowMap) -> Runs:
    """Which lane sends each row to ranks that lack it. Disjoint runs; lanes that hold a row take turns."""
    return each_row_once(have.runs)


def split_shares(stretches: Stretches, shares: Shares) -> Part:
    """The stretches of each share, where a group's rows, end to end, are split by share_start()."""
    total = sums(stretches.length, stretches.group, len(shares.of))
    rows, of = total[shares.group], shares.of[shares.group]
    first = before(total)[shares.group]  # groups end to end
    low, high = (first + share_start(rows, of, shares.number + k) for k in (0, 1))
    at = before(stretches.length)
    i, k, start, stop = meet(at, at + stretches.length, low, high)
    return Part(i, k, stretches.local[i] + start - at[i], stop - start)


def _replicas(have: RowMap) -> tuple[Column, Column]:
    """(rank, lane) of every member of `have`, in order of lane and then of rank."""
    rank, lane = have.members
    order = np.lexsort((rank, lane))
    return rank[order], lane[order]


def _requests(have: RowMap, want: RowMap, offers: Runs, lanes: Column) -> Requests:
    """All requests to `lanes` of `have`: the same, in the same order, on whichever rank computes them."""
    offered = offers.take(np.flatnonzero(np.isin(offers.lane, lanes)))
    wanted = want.runs
    i, k, _, _ = meet(wanted.start, wanted.stop, offered.start, offered.stop)
    # Each pair of lanes once, then each rank of the wanting lane.
    pairs = np.unique(offered.lane[k] * len(want.lanes) + wanted.lane[i])
    lane, reader_lane = np.divmod(pairs, max(1, len(want.lanes)))
    member, member_lane = want.members
    members = np.bincount(member_lane, minlength=len(want.lanes))
    pair, index = repeat_groups(before(members)[reader_lane], members[reader_lane])
    lane, reader, reader_lane = lane[pair], member[index], reader_lane[pair]
    lacks = np.flatnonzero(have.lanes_of(reader) != lane)
    lane, reader, reader_lane = lane[lacks], reader[lacks], reader_lane[lacks]

    _, replica_lane = _replicas(have)
    first_replica = np.searchsorted(replica_lane, lane, side="left")
    replicas = np.searchsorted(replica_lane, lane, side="right") - first_replica
    begin = np.flatnonzero(np.diff(lane, prepend=-1))  # of each lane's requests
    count = np.diff(np.append(begin, len(lane)))
    nth, readers = np.arange(len(lane)) - np.repeat(begin, count), np.repeat(count, count)
    shares = -(-replicas // np.minimum(replicas, readers))
    return Requests(
        lane=lane,
        reader=reader,
        reader_lane=reader_lane,
        first_replica=first_replica,
        replicas=replicas,
        shares=shares,
        first_turn=nth * shares,
    )


def _receive(have: RowMap, want: RowMap, offers: Runs, own: Own) -> tuple[list[Kept], list[list[Message]]]:
    """What each rank keeps, and what it receives."""
    n, size = len(own.rank), 1 + max(want.reach, have.reach)
    # Each rank's rows on one line: row r of own rank k is number k size + r.
    k, wanted = _runs_on(want, own.rank)
    begin, end = k * size + wanted.start, k * size + wanted.stop
    h, held = _runs_on(have, own.rank)
    held_begin, held_end = h * size + held.start, h * size + held.stop
    i, j, start, stop = meet(begin, end, held_begin, held_end)
    kept = _kept(k[i], start - k[i] * size, stop - start, held.shift[j], wanted.shift[i], n)
    i, start, stop = outside(begin, end, held_begin, held_end)
    k, shift, base = k[i], wanted.shift[i], k[i] * size
    i, j, start, stop = meet(start - base, stop - base, offers.start, offers.stop)
    if not len(start):
        return kept, [[] for _ in range(n)]
    # Stretches of lacking rows, grouped by rank and the lane that serves it: a group is one of its requests.
    lanes = len(have.lanes)
    key = k[i] * lanes + offers.lane[j]
    order = np.argsort(key, kind="stable")
    wants, group = np.unique(key[order], return_inverse=True)
    lacking = Stretches(group, (start + shift[i])[order], (stop - start)[order])
    requests = _requests(have, want, offers, np.unique(offers.lane[j]))
    reader = np.searchsorted(own.rank, requests.reader)
    mine = np.flatnonzero(own.rank[np.minimum(reader, n - 1)] == requests.reader)
    made = reader[mine] * lanes + requests.lane[mine]
    turn = np.argsort(made, kind="stable")
    at = np.searchsorted(made[turn], wants)
    assert np.array_equal(made[turn][at], wants), "a rank that lacks rows requests them"
    requests = requests.take(mine[turn[at]])
    shares = Shares.all(requests.shares)
    part = split_shares(lacking, shares)
    senders = requests.sender_of(shares.group[part.share], shares.number[part.share])
    at = (wants // lanes)[shares.group[part.share]]
    return kept, _messages(own, at, _replicas(have)[0][senders], part)


def _runs_on(m: RowMap, rank: Column) -> tuple[Column, Runs]:
    """Columns (k, run): the runs of rank[k], in order of k and then of first row."""
    order, ascending = m.lane_order
    k, index = indices_of(ascending, m.lanes_of(rank))
    return k, m.runs.take(order[index])


def _kept(
    k: Column, start: Column, length: Column, source_shift: Column, dest_shift: Column, n: int
) -> list[Kept]:
    """Stretches of rank k[i], in order of k: local rows are global rows + shift."""
    bounds = np.searchsorted(k, np.arange(n + 1)).tolist()
    source = rows_of_each(start + source_shift, length, bounds)
    dest = rows_of_each(start + dest_shift, length, bounds)
    return [Kept(*both) for both in zip(source, dest, strict=True)]


def _send(have: RowMap, want: RowMap, offers: Runs, own: Own) -> list[list[Message]]:
    """What each rank sends."""
    lane = have.lanes_of(own.rank)
    some = np.flatnonzero(lane >= 0)
    lanes = np.unique(lane[some])
    requests = _requests(have, want, offers, lanes)
    replica, replica_lane = _replicas(have)
    # Pairs of a rank and a request to its lane, as far as it serves a share.
    k, request = indices_of(requests.lane, lane[some])
    k = some[k]
    numbers = _index_in(replica_lane, replica, lane[some], own.rank[some])
    mine = np.zeros_like(lane)
    mine[some] = numbers
    asked = requests.take(request)
    number = mine[k] - asked.first_replica
    share = (number - asked.first_turn) % asked.replicas
    served = np.flatnonzero(share < asked.shares)
    k, requests, number = k[served], asked.take(served), share[served]
    # What each wanting lane wants of each of these lanes' offers, then for each request of one of its ranks.
    offered, wanted = offers.take(np.flatnonzero(np.isin(offers.lane, lanes))), want.runs
    i, j, start, stop = meet(wanted.start, wanted.stop, offered.start, offered.stop)
    key = offered.lane[j] * len(want.lanes) + wanted.lane[i]
    order = np.argsort(key, kind="stable")
    request, index = indices_of(key[order], requests.lane * len(want.lanes) + requests.reader_lane)
    index = order[index]
    requested = _Requested(request, start[index], stop[index], offered.shift[j][index])
    if not have.runs.disjoint:
        # Where several lanes hold a row, the reader may hold it itself.
        requested = _without_own(have, requests.reader, requested)
    shares = Shares(np.arange(len(number)), number, requests.shares)
    part = split_shares(
        Stretches(requested.request, requested.start + requested.shift, requested.stop - requested.start),
        shares,
    )
    return _messages(own, k[part.share], requests.reader[part.share], part)


def _index_in(lanes: Column, ranks: Column, lane: Column, rank: Column) -> Column:
    """The index of each (lane, rank) in columns in order of lane and then of rank."""
    size = 1 + int(ranks.max(initial=0))
    return np.searchsorted(lanes * size + ranks, lane * size + rank)


class _Requested(NamedTuple):
    """Global rows [start, stop) of a request, a line a stretch; local row = global row + shift."""

    request: Column
    start: Column
    stop: Column
    shift: Column


def _without_own(have: RowMap, reader: Column, requested: _Requested) -> _Requested:
    """Leave out the rows that the reader of the request, reader[requested.request], holds itself."""
    size = 1 + have.reach
    lane = have.lanes_of(reader)
    base = np.where(lane < 0, len(have.lanes), lane)[requested.request] * size
    i, low, high = outside(base + requested.start, base + requested.stop, *have.by_lane(size))
    return _Requested(requested.request[i], low - base[i], high - base[i], requested.shift[i])


def _messages(own: Own, k: Column, peer: Column, part: Part) -> list[list[Message]]:
    """By rank, one message a peer: part i is between own rank k[i] and peer[i]. Peers above the rank come
    first, so that not all ranks start with the same one."""
    size = 1 + int(peer.max(initial=0))
    key = (2 * k + (peer <= own.rank[k])) * size + peer
    order = np.argsort(key, kind="stable")
    key = key[order]
    bounds = [*np.flatnonzero(np.diff(key, prepend=-1)).tolist(), len(key)]
    rows = rows_of_each(part.local[order], part.length[order], bounds)
    heads = order[bounds[:-1]]
    whose, peers = k[heads].tolist(), (peer[heads] - own.base[k[heads]]).tolist()
    out: list[list[Message]] = [[] for _ in own.rank]
    for rank, other, own_rows in zip(whose, peers, rows, strict=True):
        out[rank].append(Message(other, own_rows))
    return out
