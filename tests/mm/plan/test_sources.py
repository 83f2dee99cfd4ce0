"""Entries of data.train: what each takes of its shards, how they are blended, and what is refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mm.config.schema import from_mapping, load_config, resolve_yaml
from mm.data.sample import Index
from mm.data.tally import tally_of
from mm.errors import DataError, Refused
from mm.plan.batches import Batches
from mm.plan.blueprint import draw_up
from mm.ranks.job import open_index
from tests.mm.harness import small
from tests.mm.plan.test_select import sample
from tests.mm.shards import write_shard


def opened(folder: Path, train: list[Any], **data: Any) -> tuple[Index, Batches]:
    for name, count in (("a-0", 30), ("a-1", 20), ("b-0", 10)):
        if not (folder / f"{name}.tar").exists():
            samples = [sample(f"{name}{k}", "ab", (8, 8)) for k in range(count)]
            write_shard(folder / f"{name}.tar", samples)
    raw = small(data={"train": train, "context": 20, **data}, train={"global_batch": 4})
    made = draw_up(from_mapping(raw, folder), 1)
    index = open_index(made, made.cfg.data.train, folder)
    return index, Batches.of(made.cfg, index)


def drawn(batches: Batches, index: Index, steps: int) -> list[str]:
    return [index.samples[i].key for step in range(steps) for i in batches.ids(step).tolist()]


A, B = {"shards": "a-*.tar", "weight": 3}, {"shards": ["b-*.tar"], "weight": 1}


def test_a_blend_takes_sources_by_weight_each_sample_once_an_epoch(tmp_path: Path) -> None:
    index, batches = opened(tmp_path, [{**A, "name": "first"}, B])
    assert [(s.name, s.first, s.size) for s in index.selections] == [("first", 0, 50), ("b", 50, 10)]
    keys = drawn(batches, index, 200 // batches.size)
    assert Counter(k[0] for k in keys) == {"a": 150, "b": 50}
    assert set(Counter(keys).values()) == {3, 5}
    assert {s.source for s in index.samples} == {"first", "b"}
    # A source keeps its order whatever the others, their weights and their places are.
    other, again = opened(tmp_path, [{**B, "weight": 2}, {**A, "name": "first", "weight": 2}])
    both = [[k for k in keys if k[0] == "a"], [k for k in drawn(again, other, 20) if k[0] == "a"]]
    assert both[0][: len(both[1])] == both[1]


def test_patterns_and_sources_without_weights_are_one_data_set(tmp_path: Path) -> None:
    plain, one = opened(tmp_path, ["a-*.tar", "b-0.tar"])
    mixed, other = opened(tmp_path, [{"shards": "a-*.tar", "name": "x"}, "b-0.tar"])
    assert drawn(one, plain, 15) == drawn(other, mixed, 15)
    limited, few = opened(tmp_path, [{"shards": "a-*.tar", "limit": 7}, {"shards": "b-0.tar", "limit": 5}])
    expected = {f"a-0{k}": 5 for k in range(7)} | {f"b-0{k}": 5 for k in range(5)}
    assert Counter(drawn(few, limited, 60 // few.size)) == expected


def test_splits_hold_each_sample_once_and_stay_when_shards_are_added(tmp_path: Path) -> None:
    parts = [[0, 0.7], [0.7, 1]]
    found = [opened(tmp_path, [{"shards": "a-0.tar", "split": part}])[0] for part in parts]
    keys = [{s.key for s in index.usable} for index in found]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 30 and 12 < len(keys[0]) < 28
    for index, (low, high) in zip(found, parts, strict=True):
        hashes = {s.key: hashlib.blake2b(s.key.encode(), digest_size=6).digest() for s in index.samples}
        of = {key: int.from_bytes(digest, "big") / 2**48 for key, digest in hashes.items()}
        assert {s.key for s in index.usable} == {key for key, at in of.items() if low <= at < high}
    more, batches = opened(tmp_path, [{"shards": ["b-0.tar", "a-*.tar"], "split": [0, 0.7], "name": "x"}])
    assert {k for k in (s.key for s in more.usable) if k.startswith("a-0")} == keys[0]
    assert set(drawn(batches, more, 40)) == {s.key for s in more.usable}
    with pytest.raises(DataError, match="has no sample"):
        opened(tmp_path, [{"shards": "b-0.tar", "split": [0, 1e-9]}])


def test_epochs_end_a_source_and_then_the_run(tmp_path: Path) -> None:
    index, batches = opened(tmp_path, [{**A, "weight": 1, "epochs": 1}, {**B, "epochs": 2}])
    assert batches.stream.blend.end == 70
    assert Counter(Counter(drawn(batches, index, 17)).values())[2] >= 8
    with pytest.raises(DataError, match="end after 70 samples; needed: more epochs or fewer steps"):
        batches.ids(70 // batches.size + 1)


def test_weights_follow_their_schedule(tmp_path: Path) -> None:
    schedule = [{"sample": 40, "weights": {"second": 1}}]
    index, batches = opened(tmp_path, [A, {**B, "name": "second"}], weights=schedule)
    keys = drawn(batches, index, 80 // batches.size)
    assert Counter(k[0] for k in keys[:40]) == {"a": 30, "b": 10} and {k[0] for k in keys[40:]} == {"b"}


@pytest.mark.parametrize(
    "train, said",
    [
        ([A, "b-0.tar"], "b-0.tar has no weight, others have"),
        ([{**A, "weigth": 1}], r"unknown key data.train.0.weigth; did you mean weight\?"),
        ([{**A, "weight": "much"}], "data.train.0.weight: given 'much'; needed: a .*number"),
        ([{"name": "x"}], "data.train.0.shards is missing"),
        ([7], "data.train.0: given 7; needed: a"),
        ([{**A, "split": [0.5, 0.5]}], "needed: .a, b. with a < b"),
        ([{**A, "name": "x"}, {**B, "name": "x"}], "two sources named x"),
        ([A, {**A, "weight": 1}], "two sources that are named a; needed: a name for each"),
        ([{**A, "weight": 0}], "one above it"),
        ([{"shards": "a-*.tar", "epochs": 2}, "b-0.tar"], "epochs must be equal"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(tmp_path: Path, train: list[Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        opened(tmp_path, train)


@pytest.mark.parametrize(
    "weights, said",
    [
        ([{"sample": 9, "weights": {"a": 1, "x": 1}}], "unknown key data.weights: x"),
        ([{"sample": 9, "weights": {"a": 1}}, {"sample": 9, "weights": {"a": 1}}], "rising"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(tmp_path: Path, weights: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        opened(tmp_path, [{**A, "name": "a"}], weights=weights)
    with pytest.raises(Refused, match="no source has a weight"):
        opened(tmp_path, ["a-*.tar"], weights=[{"sample": 9, "weights": {"a": 1}}])


def test_the_config_of_a_run_has_its_sources_as_they_are(tmp_path: Path) -> None:
    raw = small(data={"train": [{**A, "split": [0, 0.5]}, B]}, run={"dir": str(tmp_path / "run")})
    cfg = from_mapping(raw, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(resolve_yaml(cfg))
    again = load_config(tmp_path / "run" / "config.yaml")
    first = again.data.train[0]
    assert not isinstance(first, str) and first.split == (0, 0.5) and first.weight == 3
    assert [(again.base / p).resolve() for p in first.patterns] == [tmp_path / "a-*.tar"]


def test_what_is_taken_is_counted_from_columns_as_from_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "c.tar", [sample("odd", "x", (7, 9)), sample("long", "x" * 40, (8, 8), (8, 12))])
    entries = [{"shards": "a-*.tar", "split": [0, 0.5]}, {"shards": "c.tar"}]
    rules = {"misfit": "skip", "overlong": "truncate", "max_skipped": 1}
    for train in (entries, ["a-*.tar", "c.tar"]):
        index, _ = opened(tmp_path, train, **rules)
        plain = replace(index, samples=tuple(index.samples), tally=None)
        ours, theirs = tally_of(replace(index, tally=None)), tally_of(plain)
        assert [x.tolist() for x in ours[:2]] == [x.tolist() for x in theirs[:2]]
        assert {m: n.tolist() for m, n in ours.items.items()} == {
            m: n.tolist() for m, n in theirs.items.items()
        }
        assert index.usable.ids.tolist() == [s.id for s in index.usable] and ours.truncated.sum() == 1
