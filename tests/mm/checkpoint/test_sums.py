"""Samples that changed between stop and resume are named: text, pictures and sounds alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mm.checkpoint.sums import SUMS, changed_samples, keep_sums
from mm.data.sample import Index
from mm.plan.batches import Cursor
from mm.plan.drawn import differences, history
from tests.mm.plan.test_drawn import opened
from tests.mm.plan.test_select import picture, sample
from tests.mm.shards import write_shard

Made = tuple[Any, Index, Any]
PAIR = {"i0.png": picture(8, 8, grey=3), "i1.png": picture(8, 8, grey=5)}
SAMPLES = [
    *(sample(f"b{k}", "ab", (8, 8)) for k in range(5)),
    {**sample("b5", "ab", (8, 8), (8, 8)), "parts": PAIR},
]
OTHERS = [sample(f"a{k}", "ab", (8, 8)) for k in range(3)]


def made(folder: Path, samples: list[dict[str, Any]], name: str = "x-1.tar") -> Made:
    folder.mkdir()
    write_shard(folder / "x-0.tar", OTHERS)
    write_shard(folder / name, samples)
    return opened(folder, [{"shards": "*.tar", "name": "pets"}])


def painted(which: dict[str, Any]) -> dict[str, Any]:
    return {**which, "parts": {**which["parts"], "i0.png": picture(8, 8, grey=7)}}


def swapped(which: dict[str, Any]) -> dict[str, Any]:
    return {**which, "parts": dict(zip(which["parts"], reversed(which["parts"].values()), strict=True))}


def said(old: Made, new: Made, run: Path) -> str:
    was = json.loads(json.dumps(history(*old[:2], 3, Cursor(1, 2))))
    found = differences(was, history(*new[:2], 3, Cursor(1, 2)), partial(changed_samples, run, new[1]))
    return "; ".join(found)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Path]:
    run = tmp_path_factory.mktemp("run")
    before = made(run / "data", SAMPLES)
    keep_sums(run, before[1])
    return before, run


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([*SAMPLES[:4], painted(SAMPLES[4]), SAMPLES[5]], "under the same texts (changed: b4)"),
        ([sample("b0", "cd", (8, 8)), *SAMPLES[1:]], "other texts or keys (changed: b0)"),
        ([SAMPLES[0], {**SAMPLES[1], "key": "q1"}, *SAMPLES[2:]], "other texts or keys (changed: q1)"),
        ([*SAMPLES, sample("new", "ab", (8, 8))], "had 6 samples, now 7 (new: new)"),
        ([*SAMPLES[:2], *SAMPLES[3:]], "had 6 samples, now 5 (gone, counted from 0: 2)"),
        ([*SAMPLES[:2], painted(SAMPLES[3]), *SAMPLES[4:]], "now 5 (changed or new: b3; changed or gone, "),
        ([painted(s) for s in SAMPLES], "(changed: b0, b1, b2, b3 and 2 more)"),
        ([*SAMPLES[:5], swapped(SAMPLES[5])], "under the same texts (changed: b5)"),
        (SAMPLES[::-1], "other texts or keys (in another order)"),
    ],
)
def test_samples_that_changed_are_named(
    old: tuple[Made, Path], tmp_path: Path, samples: list[dict[str, Any]], words: str
) -> None:
    found = said(old[0], made(tmp_path / "now", samples), old[1])
    assert words in found and "x-1.tar" in found, found


def test_a_shard_is_named_alone_where_the_sums_are_lost(old: tuple[Made, Path], tmp_path: Path) -> None:
    new = made(tmp_path / "now", [painted(SAMPLES[0]), *SAMPLES[1:]])
    assert "(" not in said(old[0], new, tmp_path)
    whole = (old[1] / SUMS).read_bytes()
    for damaged in (b"", whole[:-9], whole[:-3] + b"abc", bytes(len(whole))):
        (tmp_path / SUMS).write_bytes(damaged)
        assert "(" not in said(old[0], new, tmp_path)
        assert "shard x-1.tar has other pictures" in said(old[0], new, tmp_path)
    (tmp_path / SUMS).unlink()
    (tmp_path / SUMS).mkdir()
    assert "(" not in said(old[0], new, tmp_path)


def test_they_are_written_once_and_again_for_other_shards(old: tuple[Made, Path], tmp_path: Path) -> None:
    run = tmp_path
    keep_sums(run, old[0][1])
    first = (run / SUMS).stat()
    keep_sums(run, old[0][1])
    assert (run / SUMS).stat().st_ino == first.st_ino
    new = made(tmp_path / "now", [painted(SAMPLES[0]), *SAMPLES[1:]])
    keep_sums(run, new[1])
    assert (run / SUMS).stat().st_ino != first.st_ino and "(changed: b0)" in said(new, old[0], run)
