"""A checkpoint that goes from layout to layout is the same to the bit, whatever ranks and places it saw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.checkpoint import saver
from mm.checkpoint import state as checkpoint
from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from mm.train.one_step import train_step
from parallel import checkpoint as store
from tests.mm.checkpoint.runs import contents
from tests.mm.harness import CONFIGS, running, small
from tests.slow import on_demand

DEGREES = {"vision": ("tp", "cp", "pp"), "audio": ("tp", "cp", "pp"), "llm": ("tp", "cp", "pp", "ep", "etp")}
KINDS = ("replicate", "zero1", "zero2", "zero3", "hsdp", "step")
TRAIN = {"global_batch": 4, "average": 0.9, "lora": {"vision": {"rank": 2}}}


def job(layout: dict[str, Any]) -> dict[str, Any]:
    raw = small(train=TRAIN, layout=layout, run={"node_size": 2})
    raw["model"]["llm"] |= {"mtp_layers": 1, "mtp_weight": 0.3}
    return raw


def random_layout(rng: random.Random) -> tuple[int, dict[str, Any]]:
    """Ranks, and a layout on them that the config accepts: any placement, order of ranks and degrees."""
    while True:
        world, layout = rng.choice((1, 2, 3, 4)), dict[str, Any]()
        for module, degrees in DEGREES.items():
            ranks = rng.sample(range(world), rng.randint(1, world))
            layout[module] = {"ranks": ranks, "data_parallel": rng.choice(KINDS)}
            layout[module] |= {d: rng.choice((1, 1, 2)) for d in degrees}
        try:
            draw_up(from_mapping(job(layout), CONFIGS), world)
        except Refused:
            continue
        return world, layout


def save(raw: dict[str, Any], folder: str, source: str | None) -> None:
    """Save a job after its first step, or as the checkpoint at `source` has it."""
    with running(raw) as (job, feed):
        if source is None:
            train_step(job, feed, 0)
            saver.save(job, feed.index, Path(folder), 1, {3}, feed.drawn)
        else:
            found = checkpoint.load(job, feed.index, Path(source))
            saver.save(job, feed.index, Path(folder), found.step, found.bad_samples, found.drawn)


SEEDS = range(24)


@pytest.mark.parametrize("seed", on_demand(SEEDS, SEEDS[1:]))
def test_it_is_the_same_after_any_layouts(seed: int, ranks: Any, tmp_path: Path) -> None:
    rng = random.Random(seed)
    chain = [random_layout(rng) for _ in range(3)]
    paths = list[Path]()
    for n, (world, layout) in enumerate(chain):
        folder = tmp_path / str(n)
        ranks(world, save, job(layout), str(folder), str(paths[-1]) if paths else None, timeout=180)
        paths.append(folder / "step-00000001")
    first, *others = map(contents, paths)
    kinds = ("expert_bias", ".average.", "exp_avg_sq", "lora_a")
    assert [kind for kind in kinds if not any(kind in name for name in first)] == []
    for other in others:
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(other[name], first[name])] == [], chain
    said = [{**store.read_state(path), "config": None} for path in paths]
    assert said[0] == said[1] == said[2] and said[0]["bad_samples"] == [3]
