"""One axis of a module's mesh, as a layer sees it.

A layer that communicates takes the axes that it needs; there is no "current group" anywhere (law 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HandsOver(Protocol):
    """Lets another computation of this rank run while an exchange is under way (parallel.comm.turns)."""

    @property
    def shared(self) -> bool:
        """Whether there is another computation."""

    def hand_over(self) -> None:
        """Return when it is this computation's turn again."""


@dataclass(frozen=True)
class Axis:
    """A named group of ranks, as one of them sees it.

    size: number of ranks on the axis.
    rank: this rank's index, 0 <= rank < size.
    group: the process group; None only where size is 1.
    turns: of a rank's computations, for which this axis's messages of experts' rows are occasions; None: no
        other one computes meanwhile.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    turns: HandsOver | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.name, self.rank, self.size)
        assert self.size == 1 or self.group is not None, f"axis {self.name} of size {self.size} has no group"

    @staticmethod
    def single(name: str) -> Axis:
        """An axis of one rank: collectives over it do nothing."""
        return Axis(name)


@dataclass(frozen=True)
class Axes:
    """The axes that layers of one module compute over.

    tp: tensor parallel.
    ep: expert parallel, in the expert view of the same ranks.
    sequence_parallel: whether each tp rank keeps only its share of the tokens between blocks.
    cp: context parallel, which splits the tokens of a sequence.
    etp: tensor parallel inside an expert, in the expert view.
    """

    tp: Axis = Axis("tp")
    ep: Axis = Axis("ep")
    sequence_parallel: bool = False
    cp: Axis = Axis("cp")
    etp: Axis = Axis("etp")

    @property
    def token_shards(self) -> int:
        """Into how many shares the tokens are split between blocks."""
        return self.tp.size if self.sequence_parallel else 1
