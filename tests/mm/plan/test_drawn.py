"""What a run has drawn is counted by source, and a run goes on only over data that it has drawn alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mm.config.schema import Config, from_mapping
from mm.data.sample import Index
from mm.plan.batches import Batches, Cursor
from mm.plan.blueprint import draw_up
from mm.plan.drawn import NOTHING, Count, Drawn, differences, history
from mm.plan.table import SampleTable
from mm.ranks.job import open_index
from tests.mm.harness import small
from tests.mm.plan.test_select import picture, sample
from tests.mm.shards import write_shard

A, B = {"shards": "a-0.tar", "weight": 3}, {"shards": "b-0.tar", "weight": 1}
STEPS = 5


def opened(folder: Path, train: list[Any], **data: Any) -> tuple[Config, Index, Any]:
    raw = small(data={"train": train, "context": 20, **data}, train={"global_batch": 4})
    made = draw_up(from_mapping(raw, folder), 1)
    return made.cfg, open_index(made, made.cfg.data.train, folder), made.inputs


def written(folder: Path, **counts: int) -> None:
    for name, count in counts.items():
        write_shard(folder / f"{name}-0.tar", [sample(f"{name}{k:02d}", "ab", (8, 8)) for k in range(count)])


def changes(old: tuple[Config, Index, Any], new: tuple[Config, Index, Any], step: int = STEPS) -> list[str]:
    cursor = Cursor(1, 2)
    before = json.loads(json.dumps(history(*old[:2], step, cursor)))
    return differences(before, history(*new[:2], step, cursor))


def test_counts_are_by_source_and_go_on(tmp_path: Path) -> None:
    written(tmp_path, a=12, b=9)
    cfg, index, inputs = opened(tmp_path, [A, {**B, "name": "second"}])
    table, batches = SampleTable.of(index.samples, inputs), Batches.of(cfg, index)
    drawn = NOTHING
    for step in range(STEPS):
        drawn = drawn.after(batches.plan(step, table.take, inputs))
        drawn = Drawn.from_json(json.loads(json.dumps(drawn.to_json())))
    each = int(table.length[0])
    assert drawn.by_source == {"a": Count(15, 15 * each), "second": Count(5, 5 * each)}
    packed, index, inputs = opened(tmp_path, [A, B], pack=30, window=10)
    batches, drawn = Batches.of(packed, index), NOTHING
    for step in range(STEPS):
        plan = batches.plan(step, table.take, inputs)
        drawn = drawn.after(plan)
        assert plan.ends == drawn.cursor == batches.cursors[step + 1]
    again = Batches.of(packed, index, (STEPS, drawn.cursor))
    ours, theirs = again.sequences(STEPS, table.take), batches.sequences(STEPS, table.take)
    assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_run_goes_on_where_nothing_that_it_drew_changes(tmp_path: Path) -> None:
    for name in ("old", "more", "other"):
        (tmp_path / name).mkdir()
    written(tmp_path / "old", a=12, b=9)
    written(tmp_path / "more", a=12, b=10)
    write_shard(tmp_path / "other" / "a-0.tar", [sample(f"x{k:02d}", "ab", (8, 8)) for k in range(12)])
    written(tmp_path / "other", b=9)
    old = opened(tmp_path / "old", [A, B])
    assert not changes(old, opened(tmp_path / "old", [{**A, "weight": 6}, {**B, "weight": 2}]))
    assert changes(old, opened(tmp_path / "more", [A, B])) == [
        "source b had 9 samples, now 10: shard b-0.tar had 9 samples, now 10"
    ]
    assert changes(old, opened(tmp_path / "other", [A, B])) == [
        "source a had other samples or epochs: shard a-0.tar has other texts or keys"
    ]
    assert changes(old, opened(tmp_path / "old", [A])) == ["source b was there"]
    assert "the weights were" in changes(old, opened(tmp_path / "old", [A, {**B, "weight": 2}]))[0]
    # What has not come in use may change: a source without weight so far, and weights of later samples.
    late = {"sample": 20, "weights": {"a": 1, "b": 1}}
    before = opened(tmp_path / "old", [{**A, "name": "a"}, {**B, "name": "b", "weight": 0}], weights=[late])
    after = opened(tmp_path / "more", [{**A, "name": "a"}, {**B, "name": "b", "weight": 0}])
    assert not changes(before, after) and changes(before, after, step=6)
    plain = opened(tmp_path / "old", ["*-0.tar"])
    assert changes(plain, opened(tmp_path / "more", ["*-0.tar"])) == [
        "data.train had 21 samples, now 22: shard b-0.tar had 9 samples, now 10"
    ]
    packed = opened(tmp_path / "old", [A, B], pack=30, window=10)
    assert changes(packed, opened(tmp_path / "old", [A, B], pack=40, window=10)) == [
        "data.pack was 30, now 40"
    ]


def test_a_shard_that_changed_is_named_and_what_of_it(tmp_path: Path) -> None:
    def made(name: str, shards: dict[str, list[dict[str, Any]]]) -> tuple[Config, Index, Any]:
        (tmp_path / name).mkdir()
        for shard, samples in shards.items():
            write_shard(tmp_path / name / shard, samples)
        return opened(tmp_path / name, [{"shards": "*.tar", "name": "pets"}])

    one = [sample(f"a{k}", "ab", (8, 8)) for k in range(5)]
    two = [sample(f"b{k}", "ab", (8, 8)) for k in range(4)]
    old = made("old", {"x-0.tar": one, "x-1.tar": two})
    assert not changes(old, made("moved", {"y-0.tar": one, "y-1.tar": two})), "names are no content"
    painted = [*two[:3], {**two[3], "parts": {"i0.png": picture(8, 8, grey=7)}}]
    assert painted[3]["parts"] != two[3]["parts"]
    assert changes(old, made("painted", {"x-0.tar": one, "x-1.tar": painted})) == [
        "source pets: shard x-1.tar has other pictures, sounds or videos under the same texts"
    ]
    (said,) = changes(old, made("fewer", {"x-0.tar": one, "x-2.tar": two[:3]}))
    assert said.endswith("had 9 samples, now 8: shard x-1.tar is gone, shard x-2.tar is new")
    (said,) = changes(old, made("swapped", {"x-0.tar": two, "x-1.tar": one}))
    assert "shard x-0.tar had 5 samples, now 4, shard x-1.tar had 4 samples, now 5" in said
    before = json.loads(json.dumps(history(*old[:2], STEPS, Cursor(1, 2))))
    before["shards"] = before.pop("shard_sums")  # a checkpoint of old
    assert not differences(before, history(*old[:2], STEPS, Cursor(1, 2)))
