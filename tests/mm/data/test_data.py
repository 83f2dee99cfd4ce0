"""Shards, their index, the reader and the order of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.index import Sample, build_index, index_path, load_index, parse_segments, register_probe
from mm.data.inspect import inspect_text
from mm.data.order import permute_items, sample_ids
from mm.data.reader import BadSample, ShardReader
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
        assert [len(t) for t in texts] == [s.text_bytes for s in sample.segments if s.part is None]
    reader.close()
    assert "7 samples in 2 shards" in inspect_text(["a-*.tar"], tmp_path)


def test_a_stale_index_is_made_anew(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(2))
    assert len(load_index(["a.tar"], tmp_path).samples) == 2
    write_shard(shard, sensor_samples(9))
    assert len(load_index(["a.tar"], tmp_path).samples) == 9
    index_path(shard).write_text("{not json")
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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9), n=st.integers(1, 40), batch=st.integers(1, 17))
def test_every_epoch_takes_every_sample_once(seed: int, n: int, batch: int) -> None:
    stream = [i for step in range(3 * n) for i in sample_ids(seed, step, batch, n, frozenset())]
    for epoch in range(len(stream) // n):
        assert Counter(stream[epoch * n : (epoch + 1) * n]) == Counter(range(n))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 9), n=st.integers(2, 40), data=st.data())
def test_a_bad_sample_moves_no_other(seed: int, n: int, data: st.DataObject) -> None:
    bad = frozenset(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    for step in range(5):
        clean = sample_ids(seed, step, 7, n, frozenset())
        mended = sample_ids(seed, step, 7, n, bad)
        assert not bad & set(mended)
        assert all(a == b for a, b in zip(clean, mended, strict=True) if a not in bad)


def test_all_samples_bad_ends() -> None:
    with pytest.raises(DataError, match="all 3 samples"):
        sample_ids(0, 0, 2, 3, frozenset(range(3)))


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
