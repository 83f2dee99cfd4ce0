"""The index as columns: what goes in comes out, however shards are split over files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.building import Kept, current_indexes, kept_indexes
from mm.data.columns.entries import INDEX, index_columns, notes_of
from mm.data.columns.file import content_of, read_file
from mm.data.columns.samples import Samples, Shard
from mm.data.columns.store import Store, writing
from mm.data.columns.table import join
from mm.data.index import load_index
from mm.data.sample import Part, Sample, Segment
from mm.data.scan import VERSION, ShardIndex
from mm.data.storage import Storage
from tests.mm.shards import sensor_samples, write_shard

NAMES = st.sampled_from(["json", "img0.png", "aud0.wav", "l\u00e4.npy", "a.b"])
MODULES = st.sampled_from(["vision", "audio", "text\u00fc"])
META = st.dictionaries(st.sampled_from(["height", "width", "rate"]), st.integers(0, 9), max_size=2)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """A sample as a scan hands it on."""
    names = draw(st.lists(NAMES, unique=True, max_size=4).map(lambda n: [*dict.fromkeys([*n, "json"])]))
    parts = {}
    for name in names:
        sha = draw(st.binary(min_size=32, max_size=32)).hex()
        parts[name] = {
            "offset": draw(st.integers(512, 2**40)),
            "size": draw(st.integers(0, 2**35)),
            "sha256": sha,
            "meta": draw(META),
        }
    segments: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            segments.append({"kind": draw(MODULES), "part": draw(st.sampled_from(names))})
        else:
            more = draw(
                st.fixed_dictionaries({}, optional={"loss": st.just(False), "depends": st.sampled_from("ab")})
            )
            segments.append({"kind": "text", "bytes": draw(st.integers(0, 2**32 - 1)), **more})
    found = {"key": draw(st.text(max_size=6)), "segments": segments, "parts": parts}
    if draw(st.integers(0, 5)) == 0:
        found["chat"] = True
    if draw(st.booleans()):
        found |= {"text": draw(st.sampled_from(names)), "layout": draw(st.sampled_from(["captions", "chat"]))}
    return found


@st.composite
def shards(draw: st.DrawFn) -> ShardIndex:
    """What a scan has found of a shard."""
    return {
        "version": VERSION,
        "bytes": draw(st.integers(0, 2**45)),
        "mtime_ns": draw(st.integers(0, 2**61)),
        "probes": draw(st.dictionaries(st.sampled_from(["png", "wav"]), st.none() | st.just("a.b 1"))),
        "samples": draw(st.lists(entries(), max_size=4)),  # type: ignore[typeddict-item]
        "broken": draw(st.lists(st.lists(st.text(max_size=4), min_size=2, max_size=2), max_size=2)),
        "torn": draw(st.booleans()),
        "ignored": draw(st.integers(0, 9)),
        "headers": draw(st.binary(min_size=32, max_size=32)).hex(),
    }


def expected(found: list[ShardIndex]) -> list[Sample]:
    """The samples of shards, by the definition: one after another, from their entries."""
    out: list[Sample] = []
    for k, index in enumerate(found):
        for entry in (e for e in index["samples"] if not e.get("chat")):
            parts = {
                n: Part(f"{k}.tar", n, p["offset"], p["size"], p["sha256"], p["meta"])
                for n, p in entry["parts"].items()
            }
            segments = tuple(
                Segment(
                    kind=s["kind"],
                    tokens=s.get("bytes", 0),
                    part=parts[s["part"]] if "part" in s else None,
                    loss=s.get("loss", True),
                    depends=s.get("depends"),
                )
                for s in entry["segments"]
            )
            out.append(
                Sample(
                    id=len(out),
                    key=entry["key"],
                    shard=f"{k}.tar",
                    segments=segments,
                    json=parts[entry.get("text", "json")],
                    source="ab"[k % 2],
                    layout=entry.get("layout", "segments"),
                    names=tuple(dict.fromkeys(s["part"] for s in entry["segments"] if "part" in s)),
                )
            )
    return out


def parts_of(index: ShardIndex) -> str:
    """The digest of a shard's parts, by the definition: their sums, then their sizes, and nothing else."""
    parts = [part for e in index["samples"] if not e.get("chat") for part in e["parts"].values()]
    sums = b"".join(bytes.fromhex(part["sha256"]) for part in parts)
    sizes = b"".join(part["size"].to_bytes(8, "little") for part in parts)
    return hashlib.sha256(sums + sizes).hexdigest()[:16]


def samples_of(kept: list[Kept]) -> Samples:
    return Samples([Shard(f"{k}.tar", "ab"[k % 2], own, own) for k, own in enumerate(kept)])


@settings(max_examples=60, deadline=None)
@given(found=st.lists(shards(), min_size=1, max_size=5), data=st.data())
def test_samples_are_what_a_scan_has_found_however_shards_are_split_over_files(
    tmp_path_factory: Any, found: list[ShardIndex], data: st.DataObject
) -> None:
    """Tables of some shards each, joined or not, written or not: the samples are the same, gathered too."""
    folder = tmp_path_factory.mktemp("columns")
    file_of = [data.draw(st.integers(0, 2)) for _ in found]
    kept: dict[int, Kept] = {}
    for file in set(file_of):
        own = [k for k, f in enumerate(file_of) if f == file]
        named = [(f"{k}.tar", found[k]) for k in own]
        joined = data.draw(st.booleans())
        table = join([index_columns([one]) for one in named]) if joined else index_columns(named)
        if data.draw(st.booleans()):
            (folder / f"x{file}").write_bytes(b"".join(content_of(table)))
            table = read_file(folder / f"x{file}", INDEX) or table
            assert table.columns["shards"].flags.writeable is False
        kept |= {k: Kept(table, n) for n, k in enumerate(own)}
    samples, wanted = samples_of([kept[k] for k in range(len(found))]), expected(found)
    assert samples == wanted and list(samples) == wanted and samples[:2] == tuple(wanted[:2])
    assert [notes_of(*kept[k]) for k in range(len(found))] == [index["broken"] for index in found]
    assert [shard.parts for shard in samples.shard_sums] == [parts_of(index) for index in found]
    which = np.asarray(data.draw(st.permutations(range(len(wanted)))), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # as of a large table, whose pages are given back between rows
            patch.setattr("mm.data.columns.samples.LARGE", 0)
            patch.setattr("mm.data.columns.samples.MOST_APART", 2)
        got = samples.segments(which)
    names = [*samples.names.texts, None]
    flat = [seg for i in which.tolist() for seg in wanted[i].segments]
    assert got.of.tolist() == [len(wanted[i].segments) for i in which.tolist()]
    assert [names[k] or "text" for k in got.kind.tolist()] == [s.kind if s.part else "text" for s in flat]
    assert got.tokens.tolist() == [s.tokens for s in flat] and got.loss.tolist() == [s.loss for s in flat]
    assert [names[k] for k in got.depends.tolist()] == [s.depends for s in flat]
    metas = [samples.meta(m) if m >= 0 else None for m in got.meta.tolist()]
    assert metas == [s.part and s.part.meta for s in flat]
    contents = [s.part.sha256[:16] if s.part else "0" * 16 for s in flat]
    assert [n.to_bytes(8, "little", signed=True).hex() for n in got.content.tolist()] == contents
    assert [samples.sources[k] for k in got.source.tolist()] == [wanted[i].source for i in which.tolist()]


def test_shards_that_are_added_alone_are_scanned_and_files_stay_few(tmp_path: Path) -> None:
    """Appended and built at once are the same."""
    written = sensor_samples(40)
    heard: list[str] = []
    for k in range(8):
        write_shard(tmp_path / f"a-{k}.tar", written[5 * k : 5 * k + 5])
        load_index(["a-*.tar"], tmp_path)
        assert len(list(tmp_path.glob("shards-*"))) == 1 and not (tmp_path / "shards.lock").exists()
    appended = load_index(["a-*.tar"], tmp_path, storage=Storage(say=heard.append))
    (file,) = tmp_path.glob("shards-*")
    file.unlink()
    assert load_index(["a-*.tar"], tmp_path) == appended and not heard
    write_shard(tmp_path / "a-3.tar", written[15:18])
    again = load_index(["a-*.tar"], tmp_path, storage=Storage(say=heard.append))
    assert heard == [f"changed since indexed, indexing again: {tmp_path / 'a-3.tar'}"]
    assert len(again.samples) == 38 and again.samples[18].key == "s020" and again.samples[18].id == 18
    (tmp_path / "a-0.tar").unlink()
    write_shard(tmp_path / "a-9.tar", written[:1])
    load_index(["a-*.tar"], tmp_path)
    (file,) = tmp_path.glob("shards-*")
    table = read_file(file, INDEX)
    assert table is not None and sorted(table.paths) == [f"a-{k}.tar" for k in (1, 2, 3, 4, 5, 6, 7, 9)]


def test_a_large_file_is_not_written_again_for_a_small_one(tmp_path: Path) -> None:
    store = Store(tmp_path, INDEX, "index")
    written = sensor_samples(6)
    shard = str(write_shard(tmp_path / "a.tar", written[:5]))
    (kept,) = kept_indexes([shard], write=False)
    many = join([kept.table] * 3000)
    assert store.add(many)
    (large,) = tmp_path.glob("shards-*")
    assert load_index([shard], tmp_path).samples[4].key == "s004"
    write_shard(tmp_path / "b.tar", written[5:])
    assert len(load_index(["*.tar"], tmp_path).samples) == 6
    assert large.exists() and len(list(tmp_path.glob("shards-*"))) == 2


def test_many_processes_scan_as_one_does(tmp_path: Path, monkeypatch: Any) -> None:
    written = sensor_samples(30)
    shards = [str(write_shard(tmp_path / f"a-{k}.tar", written[3 * k : 3 * k + 3])) for k in range(10)]
    alone = [k.table.take([k.shard]) for k in kept_indexes(shards, write=False)]
    monkeypatch.setattr("mm.data.building.ALONE", 40_000)
    monkeypatch.setattr("mm.data.forks.ALONE", 40_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    many = [k.table.take([k.shard]) for k in kept_indexes(shards, write=False)]
    for a, b in zip(alone, many, strict=True):
        assert b"".join(content_of(join([a]))) == b"".join(content_of(join([b])))


def test_who_comes_second_waits_and_says_for_whom(tmp_path: Path) -> None:
    heard: list[str] = []
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with writing(tmp_path, heard.append):
            inside.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(20)
    with writing(tmp_path, heard.append, wait_s=0.3):  # it does not wait for ever
        assert len(heard) == 1 and heard[0].startswith(f"waiting for process {os.getpid()} on ")
    done.set()
    holder.join()
    assert not (tmp_path / "shards.lock").exists()
    (tmp_path / "shards.lock").write_text("process 1 on elsewhere")  # of one that was killed
    with writing(tmp_path, heard.append), (tmp_path / "shards.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("it is locked")
        except BlockingIOError:
            pass
    assert len(heard) == 1 and not (tmp_path / "shards.lock").exists()


def test_what_is_kept_is_found_under_any_spelling_of_the_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", sensor_samples(2))
    load_index(["a.tar"], tmp_path)
    other = str(tmp_path / "x" / ".." / "a.tar")
    (tmp_path / "x").mkdir()
    assert list(current_indexes([other])) == [other]
