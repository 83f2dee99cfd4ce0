"""What a job holds passes to a job of another layout in memory, to the bit as through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mm.checkpoint import saver
from mm.checkpoint import state as checkpoint
from mm.train.one_step import train_step
from parallel import checkpoint as store
from parallel.comm.transport import Channel
from parallel.sharding.param import local
from tests.mm.harness import running, small
from tests.slow import on_demand

SPREAD = {
    "vision": {"ranks": [2, 1, 3, 0], "tp": 2},
    "audio": {"ranks": [2, 0]},
    "llm": {"ranks": [3, 1, 2, 0], "tp": 2, "ep": 4, "sequence_parallel": True},
}
STAGED = {
    "vision": {"ranks": "0-1"},
    "audio": {"ranks": "2-3"},
    "llm": {"pp": 2, "cp": 2, "data_parallel": "zero3"},
}
APART = {"vision": {"ranks": [1]}, "audio": {"ranks": "0-3", "cp": 2}, "llm": {"ranks": "2-3", "ep": 2}}
HYBRID = {
    "llm": {"data_parallel": "hsdp"},
    "vision": {"pp": 2, "data_parallel": "replicate"},
}
PAIRS = {
    "spread to staged": (SPREAD, STAGED),
    "staged to apart": (STAGED, APART),
    "apart to hybrid": (APART, HYBRID),
    "hybrid to spread": (HYBRID, SPREAD),
}


def both_ways(old: dict[str, Any], new: dict[str, Any], folder: str) -> list[str]:
    """Names of the tensors that differ between the two ways, of weights, moments, averages and buffers."""
    train = {"average": 0.9, "lora": {"vision": {"rank": 2}}}
    with running(small(layout=old, train=train, run={"node_size": 2})) as (job, feed):
        train_step(job, feed, 0)
        path = saver.save(job, feed.index, Path(folder), 1, ())
        held = store.hold(checkpoint.state_tensors(job))
    with running(small(layout=new, train=train, run={"node_size": 2})) as (job, _):
        tensors = checkpoint.state_tensors(job)
        channel = Channel("state", job.control.group, 30.0)
        store.Handover(held, channel, job.rank.device, message_bytes=2000).fill(tensors)
        held.free()
        ours = {name: local(t).clone() for name, t in tensors.items()}
        for t in tensors.values():
            local(t).fill_(-7)
        store.load(path, tensors)
        assert len(ours) > 20 or not ours
        return [name for name, t in tensors.items() if not torch.equal(local(t), ours[name])]


@pytest.mark.parametrize("pair", on_demand(PAIRS, [*PAIRS][1:]))
def test_memory_and_checkpoint_are_the_same_way(pair: str, ranks: Any, tmp_path: Path) -> None:
    assert ranks(4, both_ways, *PAIRS[pair], str(tmp_path)) == [[]] * 4
