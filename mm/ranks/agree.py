"""What the ranks of a job agree on at its start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from mm.config.flat import flat, is_of
from mm.config.schema import shown
from mm.data.sample import Index
from mm.errors import DataError, PolyrankError
from mm.plan.blueprint import Blueprint
from mm.ranks.claim import claimed
from mm.ranks.launch import RankInfo, held_by_launcher
from mm.ranks.rendezvous import check_same
from mm.ranks.versions import versions

T = TypeVar("T")


# Keys that may differ from machine to machine: what is learned does not depend on them.
OF_A_MACHINE = (
    "run.nproc",
    "run.device",
    "data.workers",
    "data.prefetch",
    "data.item_timeout_s",
    "data.remote",
)


def facts_of(runs: Sequence[tuple[str, Blueprint]]) -> dict[str, str]:
    """What all ranks of a job must have alike before they meet: configs, plans, code, packages. By words.

    runs: by name of the stage, "" without stages.
    """
    found = versions([blueprint.cfg for _, blueprint in runs])
    for name, blueprint in runs:
        where = f"{name}: " if name else ""
        for key, value in flat(shown(blueprint.cfg)):
            if not is_of(key, OF_A_MACHINE):
                found[where + key] = f"{value}"
        plan = repr((sorted(blueprint.layouts.items()), sorted(blueprint.stages.items())))
        found[f"{where}ranks a node"] = f"{blueprint.node_size}"
        found[f"{where}the plan (a digest)"] = hashlib.sha256(plan.encode()).hexdigest()[:12]
    return found


def check_same_data(rank: RankInfo, blueprint: Blueprint, indexes: Mapping[str, Index]) -> None:
    """Raise DataError on all ranks where their shards differ, of a name each; every rank calls this."""
    if rank.store is None or rank.world == 1:
        return
    facts = {}
    for name, index in indexes.items():
        for number, shard in enumerate(getattr(index.samples, "shard_sums", ())):
            what = f"{shard.name} ({shard.samples} samples, {shard.parts})"
            facts[f"shard {number + 1} of the {name} data"] = what
        facts[f"the {name} data"] = f"{len(index.samples)} samples, digest {index.digest}"
        facts[f"samples of the {name} data that are left out"] = f"{len(index.skipped)}"
    where = f"data of {blueprint.cfg.run.dir}"
    wrong = check_same(rank.store, rank.rank, rank.world, where, facts, rank.timeout_s)
    if wrong:
        raise DataError(f"ranks do not agree on the data: {wrong}; needed: the same shards for all ranks")


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
