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
    NONE,
    Column,
    Rows,
    before,
    meet,
    outside,
    repeat_groups,
    rows_of,
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

    def served_by(self, replica: int) -> tuple[Column, Column]:
        """Columns (request, share) of what the rank at this index in _replicas() sends: the inverse of
        sender_of()."""
        number = replica - self.first_replica
        share = (number - self.first_turn) % self.replicas
        request = np.flatnonzero((number >= 0) & (number < self.replicas) & (share < self.shares))
        return request, share[request]


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


def direct(have: RowMap, want: RowMap, rank: int) -> Routes:
    """The part of `rank` in bringing every rank of `want` the rows that it lacks, each in one hop.

    A row that several lanes of `have` hold is sent by one of them. Rows that no rank has are left out.
    """
    offers = offers_of(have)
    lane = have.lane_of(rank)
    keep, recvs = _receive(have, want, offers, rank)
    return Routes(keep, [] if lane is None else _send(have, want, offers, rank, lane), recvs)


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


def _receive(have: RowMap, want: RowMap, offers: Runs, rank: int) -> tuple[Kept, list[Message]]:
    """What `rank` keeps, and what it receives."""
    lane, own_lane = want.lane_of(rank), have.lane_of(rank)
    if lane is None:
        return Kept(NONE, NONE), []
    wanted = want.runs.of_lane(lane)
    own = have.runs.of_lane(-1 if own_lane is None else own_lane)
    i, k, start, stop = meet(wanted.start, wanted.stop, own.start, own.stop)
    keep = Kept(
        source=rows_of(start + own.shift[k], stop - start),
        dest=rows_of(start + wanted.shift[i], stop - start),
    )
    i, start, stop = outside(wanted.start, wanted.stop, own.start, own.stop)
    shift = wanted.shift[i]
    i, k, start, stop = meet(start, stop, offers.start, offers.stop)
    if not len(start):
        return keep, []
    # Stretches of lacking rows, grouped by the lane that serves them: a group is one request of this rank.
    order = np.argsort(offers.lane[k], kind="stable")
    lanes, request = np.unique(offers.lane[k][order], return_inverse=True)
    lacking = Stretches(request, (start + shift[i])[order], (stop - start)[order])
    requests = _requests(have, want, offers, lanes)
    requests = requests.take(np.flatnonzero(requests.reader == rank))
    assert np.array_equal(requests.lane, lanes), "a rank that lacks rows requests them"
    shares = Shares.all(requests.shares)
    part = split_shares(lacking, shares)
    senders = requests.sender_of(shares.group[part.share], shares.number[part.share])
    return keep, _messages(_replicas(have)[0][senders], part, rank)


def _send(have: RowMap, want: RowMap, offers: Runs, rank: int, lane: int) -> list[Message]:
    """What `rank`, in this lane of `have`, sends."""
    requests = _requests(have, want, offers, np.asarray([lane]))
    replica, replica_lane = _replicas(have)
    mine = int(np.flatnonzero((replica == rank) & (replica_lane == lane))[0])
    served, number = requests.served_by(mine)
    requests = requests.take(served)
    # What each wanting lane wants of this lane's offers, then for each request of one of its ranks.
    offered, wanted = offers.of_lane(lane), want.runs
    i, k, start, stop = meet(wanted.start, wanted.stop, offered.start, offered.stop)
    order = np.argsort(wanted.lane[i], kind="stable")
    request, index = indices_of(wanted.lane[i][order], requests.reader_lane)
    index = order[index]
    requested = _Requested(request, start[index], stop[index], offered.shift[k][index])
    # Where several lanes hold a row, the reader may hold it itself.
    requested = _without_own(have, requests.reader, requested)
    shares = Shares(np.arange(len(number)), number, requests.shares)
    part = split_shares(
        Stretches(requested.request, requested.start + requested.shift, requested.stop - requested.start),
        shares,
    )
    return _messages(requests.reader[part.share], part, rank)


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


def _messages(peer: Column, part: Part, rank: int) -> list[Message]:
    """One message a peer: part i goes to, or comes from, peer[i]. Peers above this rank come first, so that
    not all ranks start with the same one."""
    turn = np.where(peer > rank, peer, peer + int(peer.max(initial=0)) + 1 + rank)
    order = np.argsort(turn, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(turn[order])) + 1) if len(order) else []
    return [Message(int(peer[g[0]]), rows_of(part.local[g], part.length[g])) for g in groups]
