"""When a transfer that its own rank does not wait for can be let go. Pure.

A sender's memory is free once its rows have left, which host backends do not say: they have to be asked, and
the answer waits for the other end to take part. So it is asked where the answer is near. A message from
another rank tells what that rank has started before it. Where nothing ever comes back (evaluation, frozen
sources, the last gradients of a pipeline) a rank keeps a few transfers of a lane under way, and then waits
for the oldest.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

# Transfers of a lane that a rank has under way without a word from the other end: the least that works.
WINDOWS = (2, 4, 8)

Key = tuple[int, int]  # a transfer: (number of its lane, micro-batch)


@dataclass
class Posts:
    """What a plan's lists say of transfers, by number of action. of: the transfers that an action starts; at:
    by transfer, the number of its start in each program; meets: by computation, the numbers of those that
    begin with it, by program."""

    of: dict[int, list[Key]] = field(default_factory=dict)
    at: dict[Key, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    meets: dict[int, Mapping[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settled:
    """By computation, the transfers that its rank lets go before it computes. known: of these it has heard
    that the other end has started them; asked: of these not, so that it may wait."""

    known: dict[int, list[Key]]
    asked: dict[int, list[Key]]


def settle(
    first: Sequence[int],
    computations: Sequence[Sequence[int]],
    before: Sequence[int],
    waits: Mapping[int, Sequence[Key]],
    posts: Posts,
    window: int,
) -> Settled:
    """Where the transfers of all programs are let go that no computation waits for. Those that are left, a
    few of a lane, are under way at the end of the step. Linear in the actions.

    first: number of each program's first action; computations: of each program, in order; before: by action,
    the last computation before it; waits: by computation, the transfers that it waits for; window: transfers
    of a lane under way without a word from the other end.
    """
    found = Settled({}, {})
    for p, mine in enumerate(computations):
        own = {key for n in mine for key in waits.get(n, ())}
        left = _hear(p, range(first[p], first[p + 1]), set(mine), own, waits, posts, found.known)
        for queue in left:
            _ask(p, queue, before, posts, window, found.asked)
    return found


def _hear(
    p: int,
    actions: range,
    mine: Collection[int],
    own: Collection[Key],
    waits: Mapping[int, Sequence[Key]],
    posts: Posts,
    known: dict[int, list[Key]],
) -> list[list[Key]]:
    """Let go what program p hears of; returns what is left of each lane."""
    came: dict[int, int] = {}  # how far each other program is known to have come
    pending: dict[int, deque[Key]] = defaultdict(deque)
    for n in actions:
        for key in posts.of.get(n, ()):
            if key not in own:
                pending[key[0]].append(key)
        if n not in mine:
            continue
        for there in (*(posts.at[key] for key in waits.get(n, ())), posts.meets.get(n, {})):
            for q, at in there.items():
                came[q] = max(came.get(q, -1), at)
        for queue in pending.values():
            while queue and all(q == p or came.get(q, -1) >= at for q, at in posts.at[queue[0]].items()):
                known.setdefault(n, []).append(queue.popleft())
    return [list(queue) for queue in pending.values()]


def _ask(
    p: int,
    queue: Sequence[Key],
    before: Sequence[int],
    posts: Posts,
    window: int,
    asked: dict[int, list[Key]],
) -> None:
    """Let go each of `queue` before what makes one that comes `window` later."""
    makes = [before[posts.at[key][p]] for key in queue]
    k = window
    for j, key in enumerate(queue):
        k = max(k, j + window)
        while k < len(queue) and makes[k] <= posts.at[key][p]:  # made together with it
            k += 1
        if k < len(queue):
            asked.setdefault(makes[k], []).append(key)
