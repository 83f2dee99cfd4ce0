"""Parts of a run as a rank of a pool has them, and what checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.checkpoint import resume, saver
from mm.checkpoint import state as checkpoint
from mm.checkpoint.alone import alone
from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.ranks.feed import Feed
from mm.ranks.job import Job, build_job, open_data, open_index
from mm.ranks.launch import RankInfo
from mm.train.one_step import open_feed
from parallel import checkpoint as store
from tests.mm.harness import CONFIGS


@contextmanager
def part_of_run(raw: dict[str, Any], folder: str, first: int, last: int) -> Iterator[tuple[Job, Feed]]:
    """A job on this rank that is to take steps [first, last): from a checkpoint unless first is 0, ending in
    one."""
    blueprint = draw_up(from_mapping(raw, CONFIGS), dist.get_world_size())
    rank = RankInfo(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    index = open_index(blueprint, blueprint.cfg.data.train, CONFIGS)
    job = build_job(blueprint, rank)
    data = open_data(job, index)
    state = checkpoint.Resumed()
    if first:
        found = resume.find(blueprint.cfg, Path(folder), rank)
        assert found is not None
        state = checkpoint.load(job, data.index, found)
        assert state.step == first
    feed = open_feed(job, data, state)
    try:
        yield job, feed
        saver.save(job, data.index, Path(folder), last, feed.bad, feed.drawn)
    finally:
        feed.close()
        data.assembler.reader.close()
        job.close()


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    tensors = {k: torch.empty(shape, dtype=dtype) for k, (shape, dtype) in store.describe(path).items()}
    store.load(path, tensors)
    return tensors


def written(folder: Path, seed: int, state: Mapping[str, Any] | None = None, **more: torch.Tensor) -> Path:
    """A checkpoint of step `seed`: two weights, a counter and a moment."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "llm.head": torch.randn(5, 3, generator=draw),
        "llm.scale": torch.randn((), generator=draw, dtype=torch.float64),
        "llm.count": torch.tensor(seed),
        "llm.adam.head.exp_avg": torch.randn(5, 3, generator=draw),
        "llm.average.head.value": torch.randn(5, 3, generator=draw),
        **more,
    }
    with alone():
        return store.save(folder, seed, tensors, state or {"config": {"of": seed, "data": {}}}, keep=0)
