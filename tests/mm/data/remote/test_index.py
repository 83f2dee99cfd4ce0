"""The index and the samples of remote shards are those of the same files on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mm.config.schema import from_mapping
from mm.data.index import load_index
from mm.data.reader import BadSample, ShardReader
from mm.data.remote.cache import BLOCK
from mm.data.remote.retry import Unreachable
from mm.data.sample import Index
from mm.data.storage import Storage
from mm.errors import DataError
from mm.plan import measured, select
from mm.plan.blueprint import draw_up
from mm.ranks.job import open_index
from tests.mm.data.remote.stores import Faulty, memory, put
from tests.mm.harness import CONFIGS, small
from tests.mm.shards import sensor_samples, write_shard

__all__ = ["memory"]
PATTERN = "memory://b/a-*.tar"


def storage(folder: Path, said: list[str], room: int = 100 * BLOCK) -> Storage:
    found = Storage.of([], str(folder / "cache"), room, 5.0, said.append)
    assert found.remote is not None
    return found


def upload(folder: Path, count: int = 2) -> Index:
    """Write shards here and there; returns their local index."""
    for k in range(count):
        path = write_shard(folder / f"a-{k}.tar", sensor_samples(5 + k, seed=k))
        put(f"memory://b/a-{k}.tar", path.read_bytes())
    return load_index(["a-*.tar"], folder)


def payloads(index: Index, reader: ShardReader) -> list[bytes]:
    found = []
    for sample in index.samples:
        parts = [sample.json, *(seg.part for seg in sample.segments if seg.part is not None)]
        reader.ahead(parts)
        found += [reader.read(sample, part) for part in parts]
    return found


def test_a_remote_data_set_is_the_local_one(memory: Faulty, tmp_path: Path) -> None:
    local, said = upload(tmp_path), list[str]()
    there = storage(tmp_path, said)
    index = load_index([PATTERN], tmp_path, storage=there)
    assert index.shards == ("memory://b/a-0.tar", "memory://b/a-1.tar")
    assert [s.key for s in index.samples] == [s.key for s in local.samples]
    assert payloads(index, ShardReader(there)) == payloads(local, ShardReader())
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("a-*.tar"))]
    assert sorted(size for _, _, size in memory.asked) == sorted(sizes)  # each streamed once, and kept
    memory.asked.clear()
    again = storage(tmp_path, said)
    assert load_index([PATTERN], tmp_path, storage=again) == index and not said
    assert payloads(index, ShardReader(again)) == payloads(local, ShardReader())
    assert not memory.asked


def test_a_shard_that_changed_since_it_was_indexed_is_named(memory: Faulty, tmp_path: Path) -> None:
    upload(tmp_path)
    said: list[str] = []
    there = storage(tmp_path, said, room=0)
    old = load_index([PATTERN], tmp_path, storage=there)
    changed = write_shard(tmp_path / "a-1.tar", sensor_samples(6, seed=9)).read_bytes()
    put("memory://b/a-1.tar", changed)
    reader = ShardReader(there)
    with pytest.raises(BadSample, match=r"a-1\.tar: .*(changed|differs)"):
        for sample in old.samples[5:]:
            reader.read(sample, sample.json)
    new = load_index([PATTERN], tmp_path, storage=storage(tmp_path, said, room=0))
    assert said == ["changed since indexed, indexing again: memory://b/a-1.tar"]
    assert payloads(new, ShardReader(there))[-1] in changed


def test_a_store_that_does_not_answer_is_no_bad_sample(memory: Faulty, tmp_path: Path) -> None:
    upload(tmp_path)
    there = storage(tmp_path, [], room=0)
    assert there.remote is not None
    client = replace(there.remote.client, limits=replace(there.remote.client.limits, pause_s=0.001))
    there = Storage(replace(there.remote, client=client))
    index = load_index([PATTERN], tmp_path, storage=there)
    memory.faults[:] = [ConnectionResetError("reset")] * 99
    reader, sample = ShardReader(there), index.samples[0]
    with pytest.raises(Unreachable, match=r"of memory://b/a-0\.tar: .*6 attempts"):
        reader.read(sample, sample.json)
    assert there.patience_s > 6 * 5.0


def test_urls_need_a_folder_and_a_match(memory: Faulty, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b/a-\*\.tar is not on this machine; needed: data\.remote\.cache"):
        load_index([PATTERN], tmp_path)
    with pytest.raises(DataError, match=r"no shard matches 'memory://b/a-\*\.tar': the store lists no such"):
        load_index([PATTERN], tmp_path, storage=storage(tmp_path, []))


def test_local_and_remote_shards_mix(memory: Faulty, tmp_path: Path) -> None:
    local = upload(tmp_path)
    there = storage(tmp_path, [])
    index = load_index(["a-0.tar", "memory://b/a-1.tar"], tmp_path, storage=there)
    assert payloads(index, ShardReader(there)) == payloads(local, ShardReader())


def test_what_does_not_fit_is_worked_out_once(
    memory: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "LARGE", 1)
    put("memory://b/a.tar", (CONFIGS / "data" / "digits-eval-000000.tar").read_bytes())
    data = {"train": ["memory://b/a.tar"], "remote": {"cache": str(tmp_path)}}
    blueprint = draw_up(from_mapping(small(data=data), tmp_path), 1)
    index = open_index(blueprint, data["train"], tmp_path)
    assert len([*tmp_path.glob("index/*/shards-*.selection")]) == 1
    monkeypatch.setattr(select, "_measure", None)  # not asked again
    assert open_index(blueprint, data["train"], tmp_path).samples == index.samples
