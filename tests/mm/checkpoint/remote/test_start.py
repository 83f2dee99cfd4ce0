"""What a run fetches of its target and what it refuses; nothing is used that differs from its sums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.checkpoint.remote import fetch as fetching
from mm.checkpoint.remote import start
from mm.checkpoint.remote.copies import write_index
from mm.checkpoint.remote.index import INDEX, Entry, RemoteIndex, is_name
from mm.checkpoint.remote.note import read_note
from mm.checkpoint.remote.start import fetch_newer, find_or_fetch, own_target
from mm.config.schema import Config, from_mapping
from mm.data.remote.urls import check_target
from mm.errors import CheckpointError, DataError
from mm.ranks.launch import RankInfo
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from tests.mm.checkpoint.remote.targets import Target, all_of, target_in
from tests.mm.harness import CONFIGS, small

ONE = RankInfo(0, 1, torch.device("cpu"))


class Made(NamedTuple):
    """A run whose checkpoints of steps 1 and 2 are in its target, and are lost here."""

    cfg: Config
    target: Target

    def newer(self, path: Path | None = None) -> bool:
        return fetch_newer(self.cfg, self.target.run, path, {})

    def find(self) -> Path | None:
        return find_or_fetch(self.cfg, self.target.run, ONE, {})

    def at(self, name: str, step: int = 2) -> Path:
        return self.target.at(step) / name

    def listing(self, change: Callable[[dict[str, Any]], None]) -> None:
        """A manifest of step 2 that a stranger has changed, and an index that has its sum."""
        path = self.at(store.MANIFEST)
        listed = json.loads(path.read_bytes())
        del listed[store.MANIFEST]
        change(listed)
        text = json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
        path.write_text(json.dumps({**listed, store.MANIFEST: {"sha256": hashlib.sha256(text).hexdigest()}}))
        index, name = self.target.index(), "step-00000002"
        entry = replace(index.checkpoints[name], manifest=hashlib.sha256(path.read_bytes()).hexdigest())
        write_index(self.target.folder, replace(index, checkpoints={**index.checkpoints, name: entry}))


def config(url: str, **more: Any) -> Config:
    return from_mapping(small(checkpoint={"remote": {"url": url}, **more}), CONFIGS)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here loses power
    target = target_in(tmp_path)
    write_index(target.folder, RemoteIndex("r"))
    target.written(1, 2)
    all_of(target.copies(keep_every=1))
    shutil.rmtree(target.run)
    monkeypatch.setattr(start, "_folder", lambda cfg: target.folder)
    return Made(config(target.folder.url), target)


def test_a_run_that_has_lost_its_folder_goes_on_from_the_newest(made: Made, capsys: Any) -> None:
    path = made.find()
    assert path == made.target.run / "step-00000002" and store.verify(path) == []
    assert (made.target.run / store.LATEST).read_text() == "step-00000002\n"
    assert "fetching file://" in capsys.readouterr().out
    asked = len(made.target.requests.asked)
    assert made.find() == path
    assert len(made.target.requests.asked) - asked == 3, "the index alone: nothing is newer"
    note = read_note(made.target.run)
    assert note is not None and note.run == "r"
    assert own_target(made.cfg, made.target.run, ONE, path) == "r"


def test_an_older_or_damaged_folder_gets_the_newer_one(made: Made, capsys: Any) -> None:
    assert made.find() is not None
    shutil.rmtree(made.target.run / "step-00000002")
    shutil.copytree(made.at(""), made.target.run / "step-00000002")
    part = made.target.run / "step-00000002" / "__0_0.distcp"
    part.write_bytes(bytes(500))
    assert made.find() == made.target.run / "step-00000002"
    assert (made.target.run / "replaced-step-00000002" / "__0_0.distcp").read_bytes() == bytes(500)
    shutil.rmtree(made.target.run / "step-00000002")
    shutil.copytree(made.at("", 1), made.target.run / "step-00000001")
    assert made.find() == made.target.run / "step-00000002"
    known = {made.target.run / "step-00000002": "not finite"}
    assert find_or_fetch(made.cfg, made.target.run, ONE, known) == made.target.run / "step-00000001"


DAMAGE: dict[str, Callable[[Made], object]] = {
    "bytes": lambda m: m.at("__1_0.distcp").write_bytes(bytes(600)),
    "short": lambda m: m.at("__1_0.distcp").write_bytes(b"\2" * 599),
    "gone": lambda m: m.at("state.json").unlink(),
    "manifest": lambda m: m.at(store.MANIFEST).write_bytes(m.at(store.MANIFEST, 1).read_bytes()),
    "all of another": lambda m: shutil.copytree(m.at("", 1), m.at(""), dirs_exist_ok=True),
    "no manifest": lambda m: m.at(store.MANIFEST).unlink(),
    "above": lambda m: m.listing(lambda x: x.update({"../evil": x.pop("state.json")})),
    "root": lambda m: m.listing(lambda x: x.update({"/tmp/evil": x.pop("state.json")})),
    "below a file": lambda m: m.listing(lambda x: x.update({"__0_0.distcp/x": x["__0_0.distcp"]})),
    "a sum": lambda m: m.listing(lambda x: x["state.json"].update(sha256="0" * 64)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_there_is_named_and_an_older_one_is_taken(how: str, made: Made, capsys: Any) -> None:
    DAMAGE[how](made)
    assert made.find() == made.target.run / "step-00000001"
    said = capsys.readouterr().err
    assert "step-00000002 is damaged: " in said and said.strip().endswith("step-00000001")
    assert {p.name for p in made.target.run.iterdir()} == {"step-00000001", "latest", "remote.json"}
    assert not list(made.target.run.parent.rglob("evil*"))


def test_where_all_are_damaged_the_run_does_not_begin_anew(made: Made) -> None:
    for step in (1, 2):
        made.at("state.json", step).unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot resume: .*step-00000002 is damaged: .*step-00000001 is"
    ):
        made.find()
    assert not store.published(made.target.run)


def test_bytes_that_change_on_the_way_are_asked_for_again(made: Made) -> None:
    asked: Counter[str] = Counter()

    def alter(url: str, data: bytes) -> bytes:
        asked[url] += 1
        return data[:-1] + b"\xff" if "distcp" in url and asked[url] == 1 else data

    made.target.requests.alter = alter
    assert made.find() == made.target.run / "step-00000002"
    assert {n for url, n in asked.items() if "distcp" in url} == {2}


def test_a_store_that_cannot_be_asked_is_no_reason_to_begin_anew(made: Made, capsys: Any) -> None:
    refused = [""]

    def fault(what: str, url: str) -> None:
        if re.search(refused[0], url):
            raise ConnectionResetError("https://me:secret@host/x reset")

    made.target.requests.fault = fault
    for refused[0] in (INDEX, "step-00000002.*state.json"):
        with pytest.raises(CheckpointError, match=r"is not known|cannot be fetched") as caught:
            made.find()
        assert "secret" not in str(caught.value) and "to begin anew" in str(caught.value)
        assert not store.published(made.target.run)
    refused[0] = "nothing"
    assert made.find() is not None
    refused[0] = INDEX
    assert made.find() == made.target.run / "step-00000002"  # it has one, and trains on
    assert "is not known" in capsys.readouterr().err
    assert own_target(made.cfg, made.target.run, ONE, made.target.run / "step-00000002") == "r"
    with pytest.raises(CheckpointError, match=r"checkpoint.remote.url: .*reset"):
        own_target(made.cfg, made.target.run, ONE, None)


def test_a_disk_without_room_is_said_before_anything_is_written(made: Made, monkeypatch: Any) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"step-00000002 has 0 MiB, .* has 0 MiB free"):
        made.find()
    assert not list(made.target.run.iterdir())


def test_a_target_is_of_one_run(made: Made) -> None:
    run = made.target.run
    with pytest.raises(
        CheckpointError, match=r"checkpoints that this run does not go on from .*step-00000002"
    ):
        own_target(made.cfg, run, ONE, None)  # begins anew, by checkpoint.resume=none
    made.target.written(5)  # another run, which is told to copy there
    assert made.find() == run / "step-00000005"
    with pytest.raises(CheckpointError, match="does not go on from"):
        own_target(made.cfg, run, ONE, run / "step-00000005")
    assert made.target.steps() == [1, 2] and read_note(run) is None
    with pytest.raises(CheckpointError, match="does not go on from"):
        own_target(made.cfg, run, ONE, run.parent / "elsewhere" / "step-00000009")
    write_index(made.target.folder, RemoteIndex("died"))  # one that has not copied anything
    assert own_target(made.cfg, run, ONE, None) == made.target.index().run != "died"
    shutil.rmtree(made.target.there / INDEX)
    with pytest.raises(CheckpointError, match=r"has step-00000001.*, which no list of a run names"):
        own_target(made.cfg, run, ONE, None)


def test_only_auto_asks_the_target(made: Made) -> None:
    cfg = config(made.target.folder.url, resume="none")
    assert find_or_fetch(cfg, made.target.run, ONE, {}) is None
    made.target.requests.asked.clear()
    assert find_or_fetch(from_mapping(small(), CONFIGS), made.target.run, ONE, {}) is None
    assert not made.target.requests.asked


NAMES = st.integers(0, 10**12).map(lambda n: f"step-{n:08d}")
FOLDERS = st.builds(lambda n, k: f"{n}.{k:08x}", NAMES, st.integers(0, 1 << 31))
VALUES = st.tuples(
    st.text("0123456789abcdef", min_size=64, max_size=64),
    st.integers(0, 1 << 60),
    st.text("abc012", min_size=1, max_size=32),
    st.dictionaries(st.sampled_from(["loss", "eval_loss"]), st.floats(allow_nan=False, allow_infinity=False)),
)


@settings(max_examples=30)
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.lists(FOLDERS, unique=True, max_size=3))
def test_an_index_is_read_as_it_was_written(values: dict[str, Any], unfinished: list[str]) -> None:
    entries = {name: Entry(f"{name}.ffffffff", *value) for name, value in values.items()}
    index = RemoteIndex("r", entries, tuple(unfinished))
    assert RemoteIndex.parse(index.written(), "there") == index


SOUND = {"folder": "step-00000001.01234567", "manifest": "0" * 64, "bytes": 1, "session": "s", "metrics": {}}


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[]", b"{}", b"\xff", b"5", b"[" * 100_000, b'{"run": "r", "checkpoints": {}}'),
        {"run": "../x"},
        {"unfinished": ["../.."]},
        {"unfinished": 5},
        {"checkpoints": {"../step-00000001": SOUND}},
        {"checkpoints": {"step-1": SOUND}},
        {"checkpoints": {"step-00000002": SOUND}},
        {"checkpoints": {"step-00000001": {**SOUND, "folder": "step-00000001.../../x"}}},
        {"checkpoints": {"step-00000001": {**SOUND, "manifest": "0"}}},
        {"checkpoints": {"step-00000001": {**SOUND, "manifest": 5}}},
        {"checkpoints": {"step-00000001": {**SOUND, "bytes": True}}},
        {"checkpoints": {"step-00000001": {**SOUND, "metrics": []}}},
        {"checkpoints": {"step-00000001": {**SOUND, "metrics": {"loss": 10**400}}}},
        {"checkpoints": {"step-00000001": None}},
        {"checkpoints": {"step-00000001": SOUND}, "unfinished": [SOUND["folder"]]},
    ],
)
def test_another_index_is_refused_in_words(raw: Any) -> None:
    whole = {"run": "r", "checkpoints": {}, "unfinished": []}
    data = raw if isinstance(raw, bytes) else json.dumps({**whole, **raw}).encode()
    with pytest.raises(CheckpointError, match=r"^there is no list of checkpoints"):
        RemoteIndex.parse(data, "there")


def test_names_of_checkpoints() -> None:
    names = [
        "step-00000001",
        "step-100000000",
        "step-1",
        "step-000000001",
        "step-0000000a",
        "step-" + "\N{ARABIC-INDIC DIGIT ONE}" * 8,
    ]
    assert [is_name(name) for name in names] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs/there", "no store"),
        ("https://host/x", "no store"),
        ("memory://x/y", "no store"),
        ("s3://KEY:SECRET@bucket/x", "a password"),
        ("s3://bucket", "which folder"),
        ("s3://bucket/", "which folder"),
        ("s3:///x", "which folder"),
        ("file://x/y", "which folder"),
        ("file:///", "which folder"),
        ("gs://bucket/a/../b", "which folder"),
    ],
)
def test_a_target_is_a_folder_of_a_store(url: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        check_target(url)
    assert "SECRET" not in str(caught.value)
    for good in ("s3://bucket/a/b/", "gs://bucket/a", "file:///a"):
        check_target(good)


def test_sums_are_those_of_manifests(made: Made) -> None:
    """The tests' own way to say it: hashlib over the files there, and the local verify."""
    assert made.find() is not None
    for path in (made.target.run / "step-00000002").iterdir():
        if path.name != store.MANIFEST:
            listed = manifest.entries(path.parent)[path.name]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == listed.sha256
