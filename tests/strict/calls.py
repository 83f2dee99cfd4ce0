"""What ranks post to the referee: communicators, operations and calls, as plain data."""

from __future__ import annotations

from typing import NamedTuple

Key = tuple[object, ...]  # a meeting of hosts at a first use, see meetings()


class Comm(NamedTuple):
    """A communicator. group: its process group's name. ranks: global ranks of its members, the group's in the
    order of the group. pair: whether it is the one that two ranks keep for unbatched messages."""

    group: str
    ranks: tuple[int, ...]
    pair: bool = False


class Op(NamedTuple):
    """One operation as one rank calls it.

    kind: "send", "recv" or the name of a collective. numel: elements of what must be alike on all members.
    peer: the other global rank of a message. detail: what else must be alike (reduction, root). splits: of an
    exchange with splits, elements (sent to, received from) each member.
    """

    kind: str
    numel: int
    dtype: str
    peer: int = -1
    detail: str = ""
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def message(self) -> bool:
        """Whether it goes from one rank to another; else all members take part."""
        return self.kind in ("send", "recv")

    def __str__(self) -> str:
        if self.message:
            word = "to" if self.kind == "send" else "from"
            return f"{self.kind} {word} {self.peer} [{self.numel} {self.dtype}]"
        what = (
            f"sends {list(self.splits[0])}, takes {list(self.splits[1])}" if self.splits else str(self.numel)
        )
        return f"{self.kind}{f' ({self.detail})' if self.detail else ''} [{what} {self.dtype}]"


class Call(NamedTuple):
    """What a rank issues at once: a collective, a message, or the messages of a batch.

    number: counts the calls of a rank. label: the communicator's name in errors. batch: whether it is one.
    """

    number: int
    comm: Comm
    ops: tuple[Op, ...]
    label: str
    batch: bool = False

    def __str__(self) -> str:
        return f"batch({', '.join(map(str, self.ops))})" if self.batch else str(self.ops[0])


def direction(rank: int, op: Op) -> tuple[int, int]:
    """(sender, receiver) of a message that `rank` posts."""
    return (rank, op.peer) if op.kind == "send" else (op.peer, rank)


def meetings(rank: int, call: Call, eager: bool) -> list[set[Key]]:
    """Where the host of `rank` meets others before a call, unless it has done so before: stage by stage.

    First the members of a communicator make it, unless it was made with its group (eager). Then both ends of
    a message connect, and all members before their first collective.
    """
    make = set[Key]() if eager else {(call.comm, "make")}
    connect: set[Key] = {
        (call.comm, *direction(rank, op)) if op.message else (call.comm, "connect") for op in call.ops
    }
    return [make, connect]


def needed_at(key: Key) -> frozenset[int]:
    """The ranks that must come to a meeting."""
    comm, *ends = key
    assert isinstance(comm, Comm)
    return frozenset(e for e in ends if isinstance(e, int)) or frozenset(comm.ranks)
