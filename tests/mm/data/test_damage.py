"""Damaged and foreign tars: nothing is lost or altered without a note."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mm.cli import main
from mm.data.columns.entries import INDEX
from mm.data.columns.file import read_file
from mm.data.index import load_index
from mm.data.inspect import index_text, inspect_text
from mm.data.scan import build_index
from mm.data.tar import BLOCK, read_contents, split_name
from mm.errors import DataError
from tests.mm.shards import sensor_samples, write_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **info: Any) -> Path:
    """A tar of files by name."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, payload in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            for key, value in info.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(payload))
    return path


def text(words: str) -> bytes:
    return json.dumps({"segments": [{"text": words}]}).encode()


def payloads(index: dict[str, Any]) -> list[list[tuple[str, int, str]]]:
    """What training reads of each sample: its json and its items in order, with their places and sums."""
    out = []
    for sample in index["samples"]:
        names = ["json", *(seg["part"] for seg in sample["segments"] if "part" in seg)]
        parts = [(name, sample["parts"][name]) for name in names]
        out.append([(name, part["offset"], part["sha256"]) for name, part in parts])
    return out


def header_bytes(shard: Path) -> list[int]:
    """The place of every byte of every header, extended ones and what they say included."""
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    return [at for m in members for at in range(m.offset, m.offset_data)]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", ["", "l\u00e4/" * 3, "long/" * 30])
def test_a_flipped_header_bit_loses_nothing_without_a_note(form: str, folder: str, tmp_path: Path) -> None:
    """And alters nothing: what is still there is what was there, under the name it had."""
    if len(folder) > 100 and form == "ustar":
        folder = "long/" * 15
    shard = tmp_path / "a.tar"
    files = {f"{folder}s{k}.{n}": b"x" * (40 + 700 * k) for k in range(4) for n in ("a.txt", "b.txt")}
    for k in range(4):
        segments = [{"sensor": n} for n in ("a.txt", "b.txt")] if k != 1 else [{"text": "alone"}]
        files[f"{folder}s{k}.json"] = json.dumps({"segments": segments}).encode()
    del files[f"{folder}s1.a.txt"], files[f"{folder}s1.b.txt"]
    write_tar(shard, files, FORMATS[form], mtime=1234.5)
    whole, before = shard.read_bytes(), build_index(shard)
    assert len(before["samples"]) == 4 and not before["broken"]
    rng = random.Random(0)
    places = rng.sample(header_bytes(shard), 120)
    silent = 0
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        shard.write_bytes(bytes(damaged))
        after = build_index(shard)
        same = payloads(after) == payloads(before)
        assert same or after["broken"], at
        silent += not after["broken"]
        assert all(s in payloads(before) for s in payloads(after)), at
        if len(folder) < 100:  # the end of a longer name has no checksum
            assert {s["key"] for s in after["samples"]} <= {s["key"] for s in before["samples"]}, at
        assert len(after["samples"]) >= 3, at  # the rest is found again
    assert silent < 60


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("k.json", ("k", "json")),
        ("./k.json", ("./k", "json")),
        ("dir.v1/k.json", ("dir.v1/k", "json")),
        ("a/b.c/k.img0.png", ("a/b.c/k", "img0.png")),
        ("k", None),
        ("dir.v1/k", None),
        ("._k.json", None),
        ("dir/.hidden", None),
        ("__meta__/k.json", None),
    ],
)
def test_keys_follow_webdataset(name: str, place: tuple[str, str] | None) -> None:
    assert split_name(name) == place
    expand = pytest.importorskip("webdataset.tariterators").base_plus_ext
    if not name.startswith("__") and "/." not in name:  # there webdataset makes the folder the key
        assert (expand(name) if expand(name)[0] else None) == place


def test_folders_and_hidden_files_in_a_tar(tmp_path: Path) -> None:
    names = ["./k.json", "dir.v1/k.json", "dir.v2/k.json"]
    extra = {"dir.v1/._k.json": b"\0apple", ".DS_Store": b"x", "README": b"read"}
    shard = write_tar(tmp_path / "a.tar", {n: text(n) for n in names} | extra)
    with tarfile.open(shard, "a") as tar:
        folder = tarfile.TarInfo("dir.v3/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    index = load_index(["a.tar"], tmp_path)
    assert [s.key for s in index.samples] == ["./k", "dir.v1/k", "dir.v2/k"]
    assert not index.broken and index.ignored == {str(shard): 3}
    assert "3 files" in inspect_text(["a.tar"], tmp_path)


def test_what_is_no_plain_file_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.json": text("a")})
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("b.json", tarfile.LNKTYPE), ("c.json", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.json"
            tar.addfile(member)
        sparse = tarfile.TarInfo("d.json")
        sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "d.json"}
        tar.addfile(sparse)
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["a"]
    assert [key for key, _ in index["broken"]] == ["b", "c", "d"]
    for (_, why), word in zip(index["broken"], ("link to a.json", "no file", "holes"), strict=True):
        assert word in why


def test_two_files_of_one_name_are_told_from_each_other(tmp_path: Path) -> None:
    """Which of them is meant nobody knows: the sample is set apart, as WebDataset refuses it."""
    shard = write_tar(tmp_path / "a.tar", {"a.json": text("a"), "b.json": text("b")})
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("a.json")
        member.size = len(text("c"))
        tar.addfile(member, io.BytesIO(text("c")))
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["b"]
    assert index["broken"] == [["a", "json is there twice"]]


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", {"k.json": text(folder)})
    index = load_index(["{one,two}/a.tar"], tmp_path)
    assert [(s.id, s.key) for s in index.samples] == [(0, "k"), (1, "k")]
    assert index.samples[0].json.sha256 != index.samples[1].json.sha256


def test_tars_one_after_another_are_read_to_the_end(tmp_path: Path) -> None:
    """Also where a hole of zeros looks like an end mark."""
    parts = [write_tar(tmp_path / f"{n}.tar", {f"{n}.json": text(n)}).read_bytes() for n in "ab"]
    shard = tmp_path / "both.tar"
    shard.write_bytes(b"".join(parts))
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["a", "b"]
    assert len(index["broken"]) == 1 and not index["torn"]
    shard.write_bytes(parts[0] + b"rubbish".ljust(BLOCK, b"."))
    assert "after its end mark" in build_index(shard)["broken"][0][1]


@pytest.mark.parametrize(
    ("contents", "word"),
    [(b"", "empty file"), (b"<html>no such page</html>" * 99, "no tar"), (text("a"), "no tar")],
)
def test_what_is_no_tar_is_said(contents: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(contents)
    found = read_contents(tmp_path / "a.tar")
    assert found.torn and word in found.lost[0].why and not found.files


def test_an_empty_tar_is_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {})
    found = read_contents(tmp_path / "a.tar")
    assert not found.torn and not found.lost and not found.files
    with pytest.raises(DataError, match="the shards are empty"):
        load_index(["a.tar"], tmp_path)


def test_a_compressed_tar_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_tar(tmp_path / "a.tar", {"a.json": text("a")})
    squeezed = tmp_path / "b.tar.gz"
    squeezed.write_bytes(gzip.compress(plain.read_bytes()))
    for command in ("index", "inspect"):
        assert main(["data", command, str(squeezed)]) == 3
        said = capsys.readouterr().err
        assert "compressed with gzip" in said and f"gunzip -k {squeezed}" in said and "torn" not in said


def test_a_foreign_tar_is_not_indexed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = write_tar(tmp_path / "a.tar", {"a.jpg": b"..", "a.cls": b"3"})
    ours = write_tar(tmp_path / "b.tar", {"b.json": text("b")})
    assert main(["data", "index", str(foreign), str(ours)]) == 3
    out, err = capsys.readouterr()
    assert not out and f"{foreign} has no sample (a: it has no json part" in err
    assert "the other 1 shards are indexed" in err
    (index,) = tmp_path.glob("shards-*.index")
    assert read_file(index, INDEX).paths == ("b.tar",)


def test_what_an_index_leaves_out_is_printed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.json": text("a"), "b.json": b"{", "c.png": b"x"})
    assert index_text([str(shard)], tmp_path).splitlines()[0].endswith("1 samples, 2 broken")
    assert "b: its json cannot be read" in index_text([str(shard)], tmp_path)


@pytest.mark.parametrize(
    "written",
    [
        b'{"segments": null}',
        b'{"segments": {"text": "a"}}',
        b'{"segments": 3}',
        b'{"segments": [{"text": "a", "loss": "false"}]}',
        b'{"segments": [{"text": "a", "depends": ["vision"]}]}',
        b'{"segments": [{"text": "a", "lors": false}]}',
        b'{"segments": [{"text": "\\ud800"}]}',
        b'{"segments": [{"text": "\xff"}]}',
        b"[" * 100_000,
        b"null",
        b'{"segments": [{"text": "a"}], "segments": [{"text": "b"}]}',
        b'{"segments": [{"text": "a", "text": "b"}]}',
        b'{"segments": [{"text": "\xed\xa0\x80"}]}',
        b'{"segments": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"segments": [{"text": "a"}], "x": ' + b"[" * 70 + b"]" * 70 + b"}",
        '{"segments": [{"text": "a"}]}'.encode("utf-16"),
        b'{"messages": [{"role": "assistant", "content": "\\udc00"}]}',
        b'{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}',
        b'{"messages": 5}',
        b"",
    ],
)
def test_a_json_that_says_nothing_clear_is_set_apart(written: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.json": written, "b.json": text("b")})
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["b"]
    assert [key for key, _ in index["broken"]] == ["a"]


def test_a_picture_with_a_broken_header_is_named(tmp_path: Path) -> None:
    segments = json.dumps({"segments": [{"vision": "i.png"}]}).encode()
    shard = write_tar(tmp_path / "a.tar", {"a.json": segments, "a.i.png": b"\x89PNG broken"})
    assert build_index(shard)["broken"][0][1].startswith("i.png: no picture, sound or video")


def test_a_hole_in_the_middle_costs_what_lay_there(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", sensor_samples(30))
    whole = build_index(shard)
    damaged = bytearray(shard.read_bytes())
    damaged[8192:12288] = bytes(4096)
    shard.write_bytes(bytes(damaged))
    after = build_index(shard)
    assert 20 <= len(after["samples"]) < 30 and after["broken"] and not after["torn"]
    assert [p for p in payloads(after) if p not in payloads(whole)] == []


LONG = "long/" * 30 + "a"


@pytest.mark.parametrize(
    ("record", "damage", "word"),
    [
        ({"VENDOR.note": "fine"}, (b"", b""), ""),
        ({"sizf": "SIZE"}, (b"", b""), "unknown record 'sizf'"),
        ({"sizf": "SIZE"}, (b"sizf=SIZE", b"size=0029"), ""),
        ({"sizf": "SIZE"}, (b"sizf=SIZE", b"size=0543"), "is damaged"),
        ({"sizf": "SIZE"}, (b"sizf=SIZE", b"size=-029"), "is damaged"),
        ({"comment": "x"}, (b"13 comment=x", b"14 comment=x"), "no record at byte"),
        ({"comment": "x"}, (b"13 comment=x", b"12 comment=x"), "no record at byte"),
        ({"path": LONG + ".json"}, (b"", b""), ""),
        ({"path": LONG + ".json"}, (b"path=long/long", b"path=long/lonf"), "differs in 1 letters"),
    ],
)
def test_extended_headers_are_held_against_the_header(
    record: dict[str, str], damage: tuple[bytes, bytes], word: str, tmp_path: Path
) -> None:
    assert len(text("a")) == 29
    name = record.get("path", "a.json")
    shard = write_tar(tmp_path / "a.tar", {name: text("a")}, pax_headers=record)
    write_tar(tmp_path / "b.tar", {"b.json": text("b")})
    whole = shard.read_bytes()
    assert whole.count(damage[0]) or not damage[0]
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # the second file follows the first
    shard.write_bytes(whole.replace(*damage, 1)[:end] + (tmp_path / "b.tar").read_bytes())
    index = build_index(shard)
    keys = [s["key"] for s in index["samples"]]
    if word:
        assert keys == ["b"] and len(index["broken"]) == 1 and word in index["broken"][0][1]
    else:
        assert keys == [name.removesuffix(".json"), "b"] and not index["broken"]


def test_a_size_may_stand_in_the_extended_header_alone(tmp_path: Path) -> None:
    """As Python writes it where it was asked to."""
    shard = write_tar(tmp_path / "a.tar", {"a.json": text("a")}, pax_headers={"size": "29"})
    assert [s["key"] for s in build_index(shard)["samples"]] == ["a"]


def test_a_size_that_two_headers_tell_otherwise_costs_one_file(tmp_path: Path) -> None:
    """Also one for which a header has no room: this one has said another."""
    shard = write_tar(tmp_path / "a.tar", {"a.json": text("a")}, pax_headers={"comment": "0123456"})
    whole = shard.read_bytes().replace(b"19 comment=0123456\n", b"19 size=9999999999\n", 1)
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # the second file follows the first
    shard.write_bytes(whole[:end] + write_tar(tmp_path / "b.tar", {"b.json": text("b")}).read_bytes())
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["b"] and len(index["broken"]) == 1


def test_a_damaged_global_header_costs_no_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", pax_headers={"comment": "x"}) as tar:
        member = tarfile.TarInfo("a.json")
        member.size = len(text("a"))
        tar.addfile(member, io.BytesIO(text("a")))
    shard = tmp_path / "a.tar"
    assert not build_index(shard)["broken"]
    shard.write_bytes(shard.read_bytes().replace(b"13 comment", b"12 comment", 1))
    index = build_index(shard)
    assert [s["key"] for s in index["samples"]] == ["a"] and "global header" in index["broken"][0][1]


def test_a_tar_inside_a_file_is_not_taken_for_the_next_header(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", {"fake.json": text("fake")}).read_bytes()
    shard = write_tar(tmp_path / "a.tar", {"a.bin": b"." * 100 + inner, "b.json": text("b")})
    damaged = bytearray(shard.read_bytes())
    damaged[0] ^= 1
    shard.write_bytes(bytes(damaged))
    assert [s["key"] for s in build_index(shard)["samples"]] == ["b"]
