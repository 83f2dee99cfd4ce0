"""Shards, their index, the reader and the order of samples."""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.building import current_indexes
from mm.data.columns.entries import INDEX
from mm.data.columns.file import content_of, read_file
from mm.data.index import load_index, register_probe
from mm.data.inspect import index_text, inspect_text
from mm.data.order import permute_items
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Sample, parse_segments
from mm.data.scan import build_index
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError
from tests.mm.harness import CONFIGS
from tests.mm.shards import sensor_samples, write_shard


def test_the_index_leads_to_every_payload(tmp_path: Path) -> None:
    written = sensor_samples(7)
    write_shard(tmp_path / "a-000000.tar", written[:3])
    write_shard(tmp_path / "a-000001.tar", written[3:])
    index = load_index(["a-{000000..000001}.tar"], tmp_path)
    assert [s.key for s in index.samples] == [w["key"] for w in written]
    assert [s.id for s in index.samples] == list(range(7))
    reader = ShardReader()
    for sample, original in zip(index.samples, written, strict=True):
        for part in sample.items("sensor"):
            assert reader.read(sample, part) == original["parts"][part.name]
            assert part.meta["dim1"] == 3
        texts = [s.text for s in parse_segments(reader.read(sample, sample.json)) if s.text is not None]
        assert [len(t) for t in texts] == [s.tokens for s in sample.segments if s.part is None]
    reader.close()
    assert "7 samples in 2 shards" in inspect_text(["a-*.tar"], tmp_path)


def test_an_index_made_before_its_probe_is_made_anew(tmp_path: Path) -> None:
    sample = {"key": "k", "segments": [{"lidar": "x.cloud"}], "parts": {"x.cloud": b"12345"}}
    write_shard(tmp_path / "a.tar", [sample])

    def meta() -> dict[str, int]:
        return dict(load_index(["a.tar"], tmp_path).samples[0].items("lidar")[0].meta)

    assert meta() == {}
    register_probe("cloud", lambda payload: {"points": len(payload)})
    assert meta() == {"points": 5}
    register_probe("cloud", lambda payload: {"points": len(payload) * 2})  # another one of the same name
    assert meta() == {"points": 10}
    written = index_file(tmp_path)
    register_probe("other", lambda payload: {"points": 1})  # of files that are not there
    assert meta() == {"points": 10} and index_file(tmp_path) == written
    unregister("cloud")  # a probe that is not registered here is believed
    assert meta() == {"points": 10} and index_file(tmp_path) == written


def unregister(extension: str) -> None:
    from mm.data import probes

    del probes._probes[extension]


def index_file(folder: Path) -> Path:
    """The only index of a folder; its name is a sum of what it holds."""
    (found,) = folder.glob("shards-*.index")
    return found


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    """Whichever bit of it is flipped: a flag or a size would else be believed."""
    write_shard(tmp_path / "a.tar", sensor_samples(3))
    samples = tuple(load_index(["a.tar"], tmp_path).samples)
    file = index_file(tmp_path)
    whole = file.read_bytes()
    rng = random.Random(0)
    for damaged in [
        *(flipped(whole, rng.randrange(len(whole)), rng.randrange(8)) for _ in range(60)),
        *(whole[: rng.randrange(len(whole))] for _ in range(5)),
        b"",
        b"null",
    ]:
        file.write_bytes(damaged)
        assert load_index(["a.tar"], tmp_path).samples == samples
        assert index_file(tmp_path) == file and file.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", file.name]


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_an_index_of_another_format_or_shard_is_made_anew(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(3))
    assert len(load_index(["a.tar"], tmp_path).samples) == 3
    file = index_file(tmp_path)
    older = replace(read_file(file, INDEX), spec=replace(INDEX, name="polyrank index 2"))
    file.write_bytes(b"".join(content_of(older)))
    assert len(load_index(["a.tar"], tmp_path).samples) == 3 and index_file(tmp_path) == file
    size = shard.stat().st_size
    write_shard(shard, [{**s, "key": f"t{s['key'][1:]}"} for s in sensor_samples(3)])
    assert shard.stat().st_size == size  # and its headers differ
    assert [s.key for s in load_index(["a.tar"], tmp_path).samples] == ["t000", "t001", "t002"]


def test_a_copy_keeps_its_index_and_what_differs_in_it_is_told(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(3))
    sample = load_index(["a.tar"], tmp_path).samples[0]
    written = index_file(tmp_path)
    shard.write_bytes(flipped(shard.read_bytes(), sample.json.offset + 30, 0))
    assert load_index(["a.tar"], tmp_path).samples[0] == sample and index_file(tmp_path) == written
    with pytest.raises(BadSample, match="sha256"):
        ShardReader().read(sample, sample.json)


def test_a_shard_that_is_mended_is_indexed_again(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(5))
    whole = shard.read_bytes()
    shard.write_bytes(flipped(whole, whole.index(b"s002.json"), 0))
    assert load_index(["a.tar"], tmp_path).broken
    shard.write_bytes(whole)
    index = load_index(["a.tar"], tmp_path)
    assert len(index.samples) == 5 and not index.broken


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(3))

    real = os.open

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def refuse_to_write(path: Any, flags: int, *mode: int) -> int:
        return refuse() if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) else real(path, flags, *mode)  # type: ignore[return-value]

    monkeypatch.setattr("os.open", refuse_to_write)
    monkeypatch.setattr("mm.data.columns.file.os.replace", refuse)
    assert len(load_index(["a.tar"], tmp_path).samples) == 3
    with pytest.raises(DataError, match=r"cannot be written; .*a\.tar would be indexed at each start"):
        index_text([str(shard)], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_the_shipped_indexes_are_those_of_the_shipped_shards() -> None:
    shards = sorted(map(str, (CONFIGS / "data").glob("*.tar")))
    assert sorted(current_indexes(shards)) == shards
    index = load_index(["data/*.tar"], CONFIGS)
    assert not index.broken and not index.torn


def test_a_stale_index_is_made_anew(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(2))
    assert len(load_index(["a.tar"], tmp_path).samples) == 2
    write_shard(shard, sensor_samples(9))
    assert len(load_index(["a.tar"], tmp_path).samples) == 9
    index_file(tmp_path).write_text("no array")
    assert len(load_index(["a.tar"], tmp_path).samples) == 9


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(600, 20_000))
def test_a_torn_shard_keeps_what_is_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    shard = write_shard(tmp_path_factory.mktemp("torn") / "a.tar", sensor_samples(9))
    whole = build_index(shard)
    shard.write_bytes(shard.read_bytes()[:cut])
    torn = build_index(shard)
    keys = [s["key"] for s in torn["samples"]]
    assert keys == [s["key"] for s in whole["samples"]][: len(keys)]
    if len(keys) < 9:
        assert torn["broken"]


def test_a_changed_or_missing_payload_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(3))
    sample = load_index(["a.tar"], tmp_path).samples[1]
    payload = bytearray(shard.read_bytes())
    payload[sample.json.offset] ^= 1
    shard.write_bytes(bytes(payload))
    with pytest.raises(BadSample, match=r"sample s001 of .*a\.tar: json differs from its index"):
        ShardReader().read(sample, sample.json)
    shard.write_bytes(bytes(payload[: sample.json.offset]))
    with pytest.raises(BadSample, match="0 bytes"):
        ShardReader().read(sample, sample.json)
    shard.unlink()
    with pytest.raises(BadSample, match="cannot be read"):
        ShardReader().read(sample, sample.json)


def test_samples_with_a_wrong_json_are_set_apart(tmp_path: Path) -> None:
    samples = sensor_samples(2)
    samples[0]["segments"] = [{"text": 3}]
    samples[1]["segments"] = [{"sensor": "none.npy"}]
    write_shard(tmp_path / "a.tar", samples)
    broken = build_index(tmp_path / "a.tar")["broken"]
    assert "segment 0" in broken[0][1] and "none.npy" in broken[1][1]
    with pytest.raises(DataError, match="no usable sample"):
        load_index(["a.tar"], tmp_path)


def test_missing_shards_are_named_with_what_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", sensor_samples(1))
    with pytest.raises(DataError, match=r"'b-\*\.tar'.*it has a\.tar"):
        load_index(["b-*.tar"], tmp_path)


def test_a_new_format_is_probed(tmp_path: Path) -> None:
    register_probe("points", lambda payload: {"points": len(payload)})
    sample = {"key": "k", "segments": [{"lidar": "x.points"}], "parts": {"x.points": b"12345"}}
    write_shard(tmp_path / "a.tar", [sample])
    assert load_index(["a.tar"], tmp_path).samples[0].items("lidar")[0].meta == {"points": 5}


def test_permuted_items_come_from_other_samples() -> None:
    samples = load_index(["data/digits-eval-*.tar"], CONFIGS).samples
    for module in ("vision", "audio"):
        mixed = permute_items(samples, module, seed=0)
        assert sorted(places(mixed, module)) == sorted(places(samples, module))
        other = "audio" if module == "vision" else "vision"
        assert places(mixed, other) == places(samples, other)
        for a, b in zip(samples, mixed, strict=True):
            assert len(a.items(module)) == len(b.items(module))
            assert not set(places([a], module)) & set(places([b], module))


def places(samples: Sequence[Sample], module: str) -> list[tuple[str, int]]:
    """Where each item of a module lies, in order."""
    return [(p.shard, p.offset) for s in samples for p in s.items(module)]


def test_the_shipped_digits_are_held_out_ragged_and_small() -> None:
    train = load_index(["data/digits-train-*.tar"], CONFIGS).samples
    held = load_index(["data/digits-eval-*.tar"], CONFIGS).samples
    for module in ("vision", "audio"):
        counts = Counter(len(s.items(module)) for s in train)
        assert counts[0] and counts[1] and counts[2]
        seen = {p.sha256 for s in train for p in s.items(module)}
        assert not seen & {p.sha256 for s in held for p in s.items(module)}
    assert len({p.meta["height"] * p.meta["width"] for s in train for p in s.items("vision")}) > 1
    for shard in CONFIGS.glob("data/*.tar"):
        assert shard.stat().st_size < 3_000_000


def test_text_survives_the_tokenizer() -> None:
    tok = Tokenizer()
    text = "sees 3 h\u00f6rt \u4e03"
    assert tok.decode(tok.encode(text)) == text
    assert len(tok.encode(text)) == len(text.encode()) and tok.vocab_size % 8 == 0
