"""What the ranks of a job agree on at its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from mm.errors import PolyrankError
from mm.ranks.claim import claimed
from mm.ranks.launch import RankInfo, held_by_launcher

T = TypeVar("T")


@contextmanager
def claimed_by_one(folders: Sequence[Path], rank: RankInfo) -> Iterator[None]:
    """Hold claims on a job's folders, unless its launcher does; every rank calls this.

    Raises Refused on all ranks where another run has one of the folders.
    """
    with ExitStack() as held:
        say = lambda line: print(line, flush=True)  # noqa: E731
        if not held_by_launcher():
            of_the_lead(rank, lambda: len(held.enter_context(claimed(folders, rank.launch, say))))
        yield


def of_the_lead(rank: RankInfo | None, decide: Callable[[], T]) -> T:
    """decide() of rank 0, on every rank; its PolyrankError is raised on all of them."""
    if rank is None or rank.world == 1:
        return decide()
    box: list[tuple[T, None] | tuple[None, PolyrankError] | None] = [None]
    if rank.rank == 0:
        try:
            box = [(decide(), None)]
        except PolyrankError as error:
            box = [(None, error)]
    dist.broadcast_object_list(box, src=0, device=rank.device)
    assert box[0] is not None
    answer, refused = box[0]
    if refused is not None:
        raise refused
    return cast(T, answer)
