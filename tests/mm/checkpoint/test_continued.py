"""Real ranks take the same samples whatever their number, and a run that goes on elsewhere is one run.

Samples of two sources are packed, an epoch of one ends inside, and one sample turns out to be torn.
"""

from __future__ import annotations

import os
import random
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from mm.data.index import load_index
from mm.ranks.feed import Prepared
from mm.train.one_step import train_step
from tests.mm.checkpoint.runs import part_of_run
from tests.mm.harness import CONFIGS, largest_difference, running, small

STEPS = 10
TORN = 17  # the sample of the first source, which comes in its first epoch


class Taken(NamedTuple):
    """What a step took: samples in their order, and where the next step begins (window, packed sequence)."""

    ids: tuple[int, ...]
    ends: tuple[int, int]


def taken(prepared: Prepared) -> Taken:
    ends = prepared.plan.ends
    assert ends is not None, "samples are packed"
    return Taken(tuple(prepared.plan.sample_ids), (ends[0], ends[1]))


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job over two shards, in one of which a picture was torn after it was indexed."""
    folder = tmp_path_factory.mktemp("data")
    files = [folder / f"digits-train-00000{n}.tar" for n in range(2)]
    for file in files:
        file.write_bytes((CONFIGS / "data" / file.name).read_bytes())
    load_index([str(file) for file in files], folder)
    at = files[0].stat()
    with tarfile.open(files[0]) as tar:
        part = next(m for m in tar if m.name.endswith("img0.png") and m.name.startswith(f"a{TORN:05d}"))
    with files[0].open("r+b") as out:
        out.seek(part.offset_data + part.size // 2)
        out.write(b"torn")
    os.utime(files[0], ns=(at.st_atime_ns, at.st_mtime_ns))
    sources = [
        {"shards": str(files[0]), "name": "first", "weight": 0.7, "limit": 40},
        {"shards": str(files[1]), "name": "second", "weight": 0.3},
    ]
    data = {"train": sources, "context": 96, "pack": 128, "window": 20, "max_skipped": 0.5}
    return small(data=data, train={"steps": STEPS, "global_batch": 5}, run={"seed": 3})


def with_workers(raw: dict[str, Any], workers: int, layout: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "layout": layout, "data": {**raw["data"], "workers": workers}}


def orders(raw: dict[str, Any]) -> list[Taken]:
    """Of all steps, by the feed alone."""
    with running(raw) as (_, feed):
        return [taken(feed.next(step, STEPS)[0]) for step in range(STEPS)]


class Part(NamedTuple):
    """Steps of a run as every rank had them."""

    metrics: list[dict[str, Any]]
    taken: list[Taken]
    bad: list[int]


def part(raw: dict[str, Any], folder: str, first: int, last: int) -> Part:
    """Steps [first, last) of a part of a run."""
    seen: list[Taken] = []
    with part_of_run(raw, folder, first, last) as (job, feed):
        real = feed.next

        def noted(step: int, stop: int) -> tuple[Prepared, float]:
            found = real(step, stop)
            seen.append(taken(found[0]))
            return found

        with mock.patch.object(feed, "next", noted):
            metrics = [asdict(train_step(job, feed, step)) for step in range(first, last)]
        return Part(metrics, seen, sorted(feed.bad))


@pytest.mark.slow
def test_orders_are_equal_for_any_ranks_and_workers(raw: dict[str, Any], ranks: Any) -> None:
    found = {
        (world, workers): ranks(world, orders, with_workers(raw, workers, {}), timeout=300)
        for world in (1, 2, 3, 4)
        for workers in (0, 1, 3)
    }
    first = found[1, 0][0]
    assert len(first) == STEPS and len({i for step in first for i in step.ids}) > 60
    for place, by_rank in found.items():
        assert all(own == first for own in by_rank), place


# Ranks in orders of their own; tp, ep, pp and dp in turn, and another number of workers each time.
ON: list[tuple[int, int, dict[str, Any]]] = [
    (4, 1, {"vision": {"ranks": [2, 1, 3, 0], "tp": 2}, "audio": {"ranks": [2, 0]}, "llm": {"ep": 4}}),
    (3, 0, {"audio": {"ranks": [2]}}),
    (1, 3, {}),
    (2, 2, {"llm": {"pp": 2}, "vision": {"ranks": [1]}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_goes_on_on_other_ranks_is_one_run(
    raw: dict[str, Any], ranks: Any, tmp_path: Path, seed: int
) -> None:
    """Stopped at any three steps: on 4 ranks, then on 3, on 1 and on 2."""
    whole: Part = ranks(2, part, raw, str(tmp_path / "whole"), 0, STEPS, timeout=300)[0]
    stops = [0, *sorted(random.Random(seed).sample(range(1, STEPS), 3)), STEPS]
    for (world, workers, layout), first, last in zip(ON, stops, stops[1:], strict=False):
        job = with_workers(raw, workers, layout)
        by_rank: list[Part] = ranks(world, part, job, str(tmp_path / "parts"), first, last, timeout=300)
        assert all(own.taken == whole.taken[first:last] for own in by_rank), (world, first, last)
        assert largest_difference(by_rank[0].metrics, whole.metrics[first:last]) < 1e-9
        counts = [m["drawn_by_source"] for m in by_rank[0].metrics]
        assert counts == [m["drawn_by_source"] for m in whole.metrics[first:last]]
        skipped = [m["skipped_items"] for m in by_rank[0].metrics]
        assert skipped == [m["skipped_items"] for m in whole.metrics[first:last]]
    assert by_rank[0].bad == whole.bad and len(whole.bad) == 1, "the torn sample was drawn"
    assert whole.metrics[-1]["drawn_by_source"]["first"].samples > 40, "an epoch has ended inside"
