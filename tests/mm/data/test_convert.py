"""Shards made of what people have: the same whoever makes them, and what is left out is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mm.cli import main
from mm.data.convert import run, shards
from mm.data.convert.run import Request, convert
from mm.data.encode import parse_sample
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.sample import Index
from mm.errors import DataError, Refused
from tests.mm.data.test_layouts import WRITTEN, picture, turns, write
from tests.mm.shards import sensor_samples, write_shard
from tests.pages import ROOT


def read(index: Index) -> list[tuple[Any, list[bytes]]]:
    """By sample, what it has as text, and its media; their names differ between shards and are left out."""
    reader, out = ShardReader(), []
    for s in index.samples:
        payload = reader.read(s, s.json)
        written = parse_sample(payload, s.layout, s.json.name, s.names)
        media = [reader.read(s, seg.part) for seg in s.segments if seg.part is not None]
        said = written if isinstance(written, list) else written.messages
        plain = json.dumps([getattr(x, "__dict__", x) for x in said])
        out.append((plain.replace("img0.png", "png"), media))
    return out


def made(out: Path) -> dict[str, bytes]:
    """All files of a folder of shards but the lock."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def llava(folder: Path, n: int = 7) -> Path:
    """A json beside a folder of pictures; picture 3 is missing, sample 5 is none."""
    (folder / "images").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for k in range(n):
        (folder / "images" / f"{k}.png").write_bytes(picture(k))
        said = turns(f"<image>\nWhat is {k}?", f"It is {k}.")
        records.append({"id": f"id{k}", "image": f"images/{k}.png", "conversations": said})
    (folder / "images" / "3.png").unlink()
    records[5]["conversations"] = "none"
    (folder / "data.json").write_text(json.dumps(records))
    return folder


PLAIN = {"layout": "conversations", "plain": True}


def ask(folder: Path, out: Path, **options: Any) -> Request:
    return Request((str(folder),), out, **{"shard_size": 2, "layout": PLAIN} | options)


def quietly(request: Request) -> dict[str, int]:
    return convert(request, 1, lambda line: None)


def test_a_conversation_folder_becomes_shards_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    counts = quietly(ask(llava(tmp_path / "in"), tmp_path / "out"))
    assert counts == {"samples": 5, "bad": 2, "missing": 1, "shards": 4}
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [b["where"].rpartition("/")[2] for b in bad] == ["data.json record 4", "data.json record 6"]
    assert "images/3.png is not in" in bad[0]["why"] and "no list of turns" in bad[1]["why"]
    index = load_index(["out/out-*.tar"], tmp_path)
    assert [s.key for s in index.samples] == [f"{k:09d}" for k in (0, 1, 2, 4, 6)] and not index.broken
    for sample, (said, media) in zip(index.samples, read(index), strict=True):
        assert media == [picture(int(sample.key))] and f"What is {int(sample.key)}?" in said


def test_neither_order_nor_restarts_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are whole stay; one that is torn, or whose note is gone, is made again."""
    source = llava(tmp_path / "in")
    quietly(ask(source, tmp_path / "a" / "x"))
    make = run._make
    monkeypatch.setattr(run, "_make", lambda todo, *rest: make(todo[::-1], *rest))
    quietly(ask(source, tmp_path / "b" / "x"))
    monkeypatch.undo()
    whole = made(tmp_path / "a" / "x")
    assert made(tmp_path / "b" / "x") == whole
    out = tmp_path / "b" / "x"
    kept = (out / "x-000001.tar").stat().st_ino
    (out / "x-000000.tar").write_bytes(b"torn")
    (out / ".convert" / "000002.json").unlink()
    (out / ".x-000003.tar.77.tmp").write_bytes(b"left by a process that was killed")
    (out / "bad.jsonl").unlink()
    said: list[str] = []
    convert(ask(source, out), 1, said.append)
    assert said[0] == "2 of 4 shards are there already" and made(out) == whole
    assert (out / "x-000001.tar").stat().st_ino == kept


@pytest.mark.slow
def test_killed_anywhere_and_started_again_gives_the_same_shards(processes: None, tmp_path: Path) -> None:
    source = llava(tmp_path / "in", 120)
    quietly(ask(source, tmp_path / "a" / "x"))
    out = tmp_path / "b" / "x"
    given = [str(source), "--out", str(out), "--layout", "{layout: conversations, plain: true}"]
    command = [sys.executable, "-m", "mm", "data", "convert", *given, "--shard-size", "2", "--workers", "2"]
    kills = 0
    for wait in (0.0, 0.05, 0.1, 0.2, 0.3, 60.0):
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stderr is not None
        process.stderr.readline()  # the first shard is there
        time.sleep(wait)
        if wait < 60 and process.poll() is None:
            kills += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert kills >= 2 and made(out) == made(tmp_path / "a" / "x")


def test_a_tar_reads_the_same_as_it_is_and_converted(tmp_path: Path) -> None:
    for i, (kind, (parts, _, _)) in enumerate(WRITTEN.items()):
        if kind == "text":
            continue  # two texts in a row are one caption of nothing
        source = write(tmp_path / f"in{i}.tar", {"k": parts})
        quietly(Request((str(source),), tmp_path / f"o{i}"))
        if "messages" not in WRITTEN[kind][2]:
            before, after = load_index([source.name], tmp_path), load_index([f"o{i}/*.tar"], tmp_path)
            assert [m for _, m in read(before)] == [m for _, m in read(after)], kind
            assert [[s.tokens for s in x.segments] for x in before.samples] == [
                [s.tokens for s in x.segments] for x in after.samples
            ]


def test_arrays_of_a_tar_are_parts_as_any_others(tmp_path: Path) -> None:
    source = write_shard(tmp_path / "in.tar", sensor_samples(6, seed=1))
    quietly(Request((str(source),), tmp_path / "o"))
    before, after = load_index([source.name], tmp_path), load_index(["o/*.tar"], tmp_path)
    sums = [
        [[s.part.sha256 for s in x.segments if s.part] for x in index.samples] for index in (before, after)
    ]
    assert sums[0] == sums[1] and any(sums[0])


def test_lines_with_paths_and_media_elsewhere(tmp_path: Path) -> None:
    """Paths are found in --media and beside the file, and nowhere else."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(1))
    (tmp_path / "pictures" / "host.org" / "x").mkdir(parents=True)
    (tmp_path / "pictures" / "host.org" / "x" / "b.png").write_bytes(picture(2))
    (tmp_path / "secret.png").write_bytes(picture(3))
    (tmp_path / "in").mkdir()
    lines = [
        {"image": "a.png", "caption": "a"},
        {"image": "https://host.org/x/b.png", "caption": "b"},
        {"image": "../secret.png", "caption": "c"},
        {"image": str(tmp_path / "secret.png"), "caption": "d"},
        {"image": str(tmp_path / "pictures" / "a.png"), "caption": "e"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "in" / "a.jsonl").write_text(f"{text}\n{{broken\n")
    request = Request((str(tmp_path / "in"),), tmp_path / "out", media=(str(tmp_path / "pictures"),))
    assert quietly(request) == {"samples": 3, "bad": 3, "missing": 2, "shards": 1}
    assert [m for _, m in read(load_index(["out/*.tar"], tmp_path))] == [
        [picture(1)],
        [picture(2)],
        [picture(1)],
    ]


def test_tables_of_speech_and_texts(tmp_path: Path) -> None:
    from tests.mm.data.test_recipes import tone

    (tmp_path / "cv" / "clips").mkdir(parents=True)
    (tmp_path / "cv" / "clips" / "a.wav").write_bytes(tone(400))
    (tmp_path / "cv" / "train.tsv").write_text('path\tsentence\na.wav\tHe said "no\n')
    (tmp_path / "cv" / "dev.tsv").write_text("path\tsentence\n")
    request = Request((str(tmp_path / "cv"),), tmp_path / "o")
    with pytest.raises(DataError, match=r"needed: the files that are meant, such as .*dev.tsv"):
        convert(request, 1)
    layout = {"layout": "captions", "fields": {"audio": "path"}}
    table, clips = str(tmp_path / "cv" / "train.tsv"), str(tmp_path / "cv" / "clips")
    assert quietly(Request((table,), tmp_path / "o", layout, media=(clips,)))["samples"] == 1
    segments = load_index(["o/*.tar"], tmp_path).samples[0].segments
    assert [(s.kind, s.tokens, s.depends) for s in segments] == [("audio", 0, None), ("text", 11, "audio")]
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("It was a dark night.\n")
    assert quietly(Request((str(tmp_path / "books"),), tmp_path / "t"))["samples"] == 1


def test_another_conversion_or_folder_is_refused(tmp_path: Path) -> None:
    source = llava(tmp_path / "in")
    quietly(ask(source, tmp_path / "x"))
    with pytest.raises(Refused, match="shard_size 2, now 3; needed: another --out"):
        convert(ask(source, tmp_path / "x", shard_size=3), 1)
    with run._locked(tmp_path / "x"), pytest.raises(Refused, match="another process is converting"):
        quietly(ask(source, tmp_path / "x", shard_size=2))
    (source / "data.json").write_text((source / "data.json").read_text() + " ")
    with pytest.raises(Refused, match=r"inputs, .*data.json among them"):
        convert(ask(source, tmp_path / "x"), 1)
    with pytest.raises(Refused, match="is not empty"):
        convert(ask(source, source), 1)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"a.doc": b""},
            "has no samples in a layout that is known: it has 1 .doc. Files that have",
        ),
        ({"a.jsonl": b'{"b": 1}\n'}, "are in no layout that is known .*: the first has b. Needed: --layout"),
        ({"a.jsonl": b'{"text": ""}\n'}, "no sample could be made"),
        ({"a.json": b'{"b": 1}'}, "has no list of samples"),
        ({"a.json": b"{"}, "cannot be read"),
        ({}, "it has nothing"),
    ],
)
def test_what_cannot_be_converted_is_said(
    files: dict[str, bytes], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    assert (
        main(["data", "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    )
    assert re.search(why, capsys.readouterr().err)


def test_a_shard_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its note and its tar, a shard is made again."""

    def replace(old: str, new: Path) -> None:
        if str(new).endswith(".tar"):
            raise OSError(28, "No space left on device")
        os.rename(old, new)

    monkeypatch.setattr(shards.os, "replace", replace)
    with pytest.raises(DataError, match="No space left"):
        quietly(ask(llava(tmp_path / "in"), tmp_path / "x"))
    assert not list((tmp_path / "x").glob("*.tar"))
    monkeypatch.undo()
    assert quietly(ask(tmp_path / "in", tmp_path / "x"))["samples"] == 5
