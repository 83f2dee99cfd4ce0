"""Making a job's process groups, in the order of its GroupPlan.

Each rank makes its own groups only, in calls whose number does not depend on the size of the job.

Where the default group is bound to a device (NCCL), making a group involves every rank. One split of the
default group then makes all groups of a family. Splitting sorts ranks, so a family whose ranks are in another
order is made group by group, by all ranks. This path has run on no GPU yet; tests record its calls.

Elsewhere (gloo, fake) only members meet. dist.new_group(use_local_synchronization=True) looks made for this,
but it names a group by its ranks and by how many groups the calling process has. That number differs between
members where one is in more groups than another, and they then wait for each other under different names.
Names are given here instead: the name in the plan, and the group's first rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from parallel.topology.groups import WORLD, Group, GroupPlan, Ranks

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__


@dataclass(frozen=True)
class Roll:
    """Which ranks have come to which meeting, so that errors can name those that have not.

    store: of the job; without it errors name the group alone. prefix: of the keys.
    """

    store: Store | None
    prefix: str

    @contextmanager
    def call(self, what: str, name: str, ranks: Sequence[int], timeout_s: float) -> Iterator[None]:
        """Note that this rank has come; a RuntimeError inside then names the group and who is missing."""
        if self.store is not None:
            self.store.set(self._key(what, name, dist.get_rank()), "")
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"group {name} of {len(ranks)} ranks was not {what} within {timeout_s:g} s; "
                f"{self._absent(what, name, ranks)} ({str(error).splitlines()[0]})"
            ) from error

    def _absent(self, what: str, name: str, ranks: Sequence[int]) -> str:
        """Who has not come, in words."""
        if self.store is None:
            return f"its ranks are {_some(ranks)}"
        missing = [r for r in ranks if not self.store.check([self._key(what, name, r)])]
        if not missing:
            return "all its ranks have come to it, so a connection between them has failed"
        return f"not yet there: rank{'s' if len(missing) > 1 else ''} {_some(missing)}"

    def _key(self, what: str, name: str, rank: int) -> str:
        return f"{self.prefix}/{what}/{name}/{rank}"


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", .." if len(ranks) > 8 else "")


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank.

    Two names have the same process group where their lane and ranks are equal. close() ends them all.
    """

    plan: GroupPlan
    rank: int
    timeout_s: float
    roll: Roll = field(repr=False)
    _ranks: dict[Group, Ranks] = field(repr=False)  # by name, in order, of this rank
    _made: dict[tuple[str, Ranks], dist.ProcessGroup] = field(repr=False)  # by lane and ranks
    _alone: list[dist.ProcessGroup] = field(default_factory=list, repr=False)

    def find(self, name: Group) -> dist.ProcessGroup | None:
        """This rank's group of a name; None where it has one rank, or where the rank is in none."""
        ranks = self._ranks.get(name)
        return None if ranks is None else self._made[name.lane, ranks]

    def __getitem__(self, name: Group) -> dist.ProcessGroup:
        """This rank's group of a name, which must have several ranks."""
        group = self.find(name)
        assert group is not None, f"rank {self.rank} is in no group {name} of several ranks"
        return group

    def __iter__(self) -> Iterator[tuple[Group, Ranks]]:
        """(name, ranks) of this rank's groups, in the order of the plan."""
        return iter(self._ranks.items())

    def alone(self) -> dist.ProcessGroup:
        """A group of this rank alone, for what insists on a group; made once and without a message.

        Nothing is ever sent in it. It is a host group, since one on a device would take memory there.
        """
        if not self._alone:
            host = dist.get_default_backend_for_device("cpu") if _bound() else None
            new_group: Callable[..., dist.ProcessGroup] = dist.new_group  # which torch leaves untyped
            self._alone.append(new_group([self.rank], backend=host, use_local_synchronization=True))
        return self._alone[0]

    def close(self) -> None:
        """Destroy the groups, except the default one; every rank calls this."""
        for group in [*self._made.values(), *self._alone]:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._made.clear()
        self._alone.clear()
        self._ranks.clear()


def make_groups(plan: GroupPlan, *, timeout_s: float, store: Store | None = None) -> Groups:
    """Make this rank's groups; every rank of the default process group calls this, with an equal plan.

    timeout_s: of all groups but the default one, which keeps its own. store: of the job. Raises RuntimeError
    naming the group, and with a store the ranks that are missing, where some do not come in time.
    """
    rank, limit = dist.get_rank(), timedelta(seconds=timeout_s)
    assert plan.world == dist.get_world_size(), (plan.world, dist.get_world_size())
    world = dist.group.WORLD
    assert world is not None
    made: dict[tuple[str, Ranks], dist.ProcessGroup] = {(WORLD.lane, tuple(range(plan.world))): world}
    # The number is equal on all ranks: those of groups of an earlier plan differ from those of this one.
    number = c10d._process_group_name([], use_hashed_name=False)
    roll = Roll(store, f"groups/{number}")
    for name, groups in plan.families:
        mine = next((g for g in groups if rank in g), None)
        if _bound():
            group = _make_together(groups, str(name), limit)
        elif mine is not None:
            group = _make_here(mine, f"{number}/{name}/{mine[0]}", limit, roll)
        if mine is not None:
            assert group is not None
            made[name.lane, mine] = group
    return Groups(plan, rank, timeout_s, roll, plan.of_rank(rank), made)


def _bound() -> bool:
    """Whether the default group is bound to a device, so that groups are made by all ranks together."""
    world: Any = dist.group.WORLD
    return world.bound_device_id is not None


def _make_here(ranks: Ranks, name: str, timeout: timedelta, roll: Roll) -> dist.ProcessGroup:
    """The group of `ranks` in this order; only they call this. It is made as dist.new_group() makes it."""
    world: Any = dist.group.WORLD
    backend, store = c10d._world.pg_map[world]
    make: Callable[..., Any] = c10d._new_process_group_helper
    me = ranks.index(dist.get_rank())
    with roll.call("made", name, ranks, timeout.total_seconds()):
        group, _ = make(
            len(ranks), me, list(ranks), backend, store, group_name=name, timeout=timeout, group_desc=name
        )
    c10d._world.pg_group_ranks[group] = {r: k for k, r in enumerate(ranks)}
    made: dist.ProcessGroup = group
    return made


def _make_together(groups: Sequence[Ranks], name: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """This rank's one of disjoint groups, None where it is in none; every rank calls this."""
    if all(list(ranks) == sorted(ranks) for ranks in groups):
        split: Callable[..., dist.ProcessGroup | None] = dist.split_group
        return split(split_ranks=[list(ranks) for ranks in groups], timeout=timeout, group_desc=name)
    made = [ordered_group(ranks, timeout) for ranks in groups]
    rank = dist.get_rank()
    return next((group for ranks, group in zip(groups, made, strict=True) if rank in ranks), None)


def ordered_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """new_group() in which ranks[k] is rank k, so that a rank's index in the group is its coordinate on the
    axis. Every rank of the job calls this; those that are not in `ranks` get what new_group() returns there.
    """
    new_group: Callable[..., dist.ProcessGroup] = dist.new_group  # which torch leaves untyped
    if "sort_ranks" in inspect.signature(new_group).parameters:
        return new_group(list(ranks), timeout=timeout, sort_ranks=False)
    return new_group(ordered(ranks), timeout=timeout)


def ordered(ranks: Sequence[int]) -> list[int]:
    """`ranks` as numbers that sorting leaves in this order: torch before 2.12 sorts those of a new group."""
    return [_Ordered(rank, k) for k, rank in enumerate(ranks)]


class _Ordered(int):
    """A rank that is compared by its index among others."""

    index: int

    def __new__(cls, rank: int, index: int) -> _Ordered:
        out = super().__new__(cls, rank)
        out.index = index
        return out

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __lt__(self, other: int) -> bool:
        return self.index < other.index if isinstance(other, _Ordered) else int(self) < other
