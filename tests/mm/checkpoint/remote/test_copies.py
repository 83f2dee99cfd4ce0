"""What is copied to a target, what stays there, and that a reader never sees half of a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from mm.checkpoint.kept import rule_of
from mm.checkpoint.remote.copies import write_index
from mm.checkpoint.remote.index import INDEX, RemoteIndex
from mm.checkpoint.remote.note import Note, read_note, with_copied, write_note
from mm.config.schema import CheckpointConfig
from mm.data.remote import folder as folders
from mm.data.remote.folder import Pace
from mm.data.remote.retry import Unreachable
from mm.errors import CheckpointError
from parallel import checkpoint as store
from tests.mm.checkpoint.remote.targets import Killed, Target, all_of, target_in


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """One that is the run's, without a checkpoint."""
    target = target_in(tmp_path)
    write_index(target.folder, RemoteIndex("r"))
    return target


def test_the_newest_is_copied_first_and_the_middle_ones_are_passed_over(target: Target) -> None:
    target.written(1, 2, 3, 4)
    assert all_of(target.copies(keep=0, keep_every=2)) == ["step-00000004", "step-00000002"]
    assert target.steps() == [2, 4]
    target.written(5)
    assert all_of(target.copies(keep=0, keep_every=2)) == ["step-00000005"]


def test_rules_hold_there_likewise(target: Target) -> None:
    rules = {"keep": 2, "keep_every": 4, "keep_best": "loss", "remote": {"keep": 1}}
    for step, loss in ((1, 5.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 4.0), (6, 9.0)):
        target.written(step, loss=loss)
        assert all_of(target.copies(**rules)) == [f"step-{step:08d}"]
    assert target.steps() == [2, 4, 6]
    assert not target.index().unfinished
    assert target.folders() == [INDEX, *(f"step-{n:08d}" for n in (2, 4, 6))]
    assert len(list((target.there / INDEX).iterdir())) == 2
    target.lost(2, 4)  # there for good, though the run's folder has lost them
    target.written(7, loss=8.0)
    assert all_of(target.copies(**rules)) == ["step-00000007"] and target.steps() == [2, 4, 7]


def test_a_process_that_ends_at_any_write_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """Before each of a copy that removes another one; a later start ends with the same objects."""
    ends, done = 0, False
    while not done:
        target = target_in(tmp_path / str(ends))
        write_index(target.folder, RemoteIndex("r"))
        target.written(1)
        all_of(target.copies(keep=1))
        target.written(2)
        left = ends

        def end(what: str, url: str) -> None:
            nonlocal left
            left -= what in ("put", "begin", "remove")
            if left < 0:
                raise Killed

        target.requests.fault = end
        with contextlib.suppress(Killed):
            done = all_of(target.copies(keep=1)) == ["step-00000002"]
        target.requests.fault = lambda what, url: None
        assert target.steps() in ([1], [1, 2], [2])
        again = all_of(target.copies("two", first=1, keep=1))
        target.written(3)
        assert all_of(target.copies("two", first=1, keep=1)) == ["step-00000003"], again
        assert target.steps() == [3]
        assert target.folders() == [INDEX, "step-00000003"]
        ends += 1
    assert ends > 10


def test_a_store_that_fails_leaves_what_was_there(target: Target) -> None:
    target.written(1)
    all_of(target.copies())
    target.written(2)

    def busy(what: str, url: str) -> None:
        if "distcp" in url:
            raise ConnectionResetError("gone away")

    target.requests.fault = busy
    with pytest.raises(Unreachable, match=r"\.distcp: ConnectionResetError: gone away; 3 attempts have fai"):
        target.copies().copy_one()
    target.requests.fault = lambda what, url: None
    assert target.steps() == [1] and len(target.index().unfinished) == 1
    assert all_of(target.copies()) == ["step-00000002"] and target.steps() == [1, 2]


def test_a_checkpoint_that_is_damaged_here_is_not_published_there(target: Target) -> None:
    target.written(1)
    part = next((target.run / "step-00000001").glob("*.distcp"))
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(store.BadCheckpoint, match=r"\.distcp is damaged: it differs from manifest.json"):
        target.copies().copy_one()
    assert target.steps() == []
    assert not list(target.there.rglob(store.MANIFEST))


def test_what_is_being_copied_stays_in_the_runs_folder(target: Target) -> None:
    target.written(1, 2, 3)
    stay = with_copied(rule_of(CheckpointConfig(keep=1)), target.run)
    seen = list[set[str]]()

    def look(what: str, url: str) -> None:
        if "__0_0.distcp" in url and what == "put":
            target.written(4)
            seen.append({p.name for p in stay(store.published(target.run))})

    target.requests.fault = look
    target.copies(keep=1).copy_one()
    assert seen == [{"step-00000003", "step-00000004"}]
    assert {p.name for p in stay(store.published(target.run))} == {"step-00000004"}
    assert read_note(target.run) == Note("r")
    (target.run / "remote.json").write_text("[]")
    assert read_note(target.run) is None
    write_note(target.run, Note("r", "step-00000001"))
    assert len(list(stay(store.published(target.run)))) == 2


def test_a_target_of_another_run_is_not_written_to(target: Target) -> None:
    target.written(1)
    with pytest.raises(CheckpointError, match="belongs to another run now"):
        target.copies(run="other").copy_one()
    assert target.folders() == [INDEX]
    shutil.rmtree(target.there / INDEX)  # of a run that went on when the store could not be asked
    assert all_of(target.copies()) == ["step-00000001"] and target.steps() == [1]


def test_a_store_that_lets_nothing_be_removed_gets_copies_all_the_same(target: Target) -> None:
    def denied(what: str, url: str) -> None:
        if what == "remove" and "step-" in url:
            raise PermissionError("no")

    target.written(1)
    all_of(target.copies(keep=1))
    target.requests.fault = denied
    for step in (2, 3):
        target.written(step)
        with pytest.raises(PermissionError, match=r"removing objects of .*step-.*: access is denied"):
            target.copies(keep=1).copy_one()
        assert target.steps() == [step] and len(target.index().unfinished) == step - 1
        assert target.copies(keep=1).copy_one() is None
    target.requests.fault = lambda what, url: None
    target.written(4)
    all_of(target.copies(keep=1))
    assert target.folders() == [INDEX, "step-00000004"]


def test_a_run_that_goes_back_gives_up_what_came_after(target: Target) -> None:
    target.written(1, 2, 3)
    all_of(target.copies(keep=0, keep_every=1))
    assert target.steps() == [1, 2, 3]
    target.lost(2, 3)
    assert all_of(target.copies("two", first=1, keep=0)) == []
    assert target.steps() == [1] and len(list(target.there.iterdir())) == 2
    target.written(2)
    assert all_of(target.copies("two", first=1, keep=0)) == ["step-00000002"]
    assert all_of(target.copies("two", first=1, keep=0)) == [] and target.steps() == [1, 2]


@pytest.mark.parametrize("size", [0, 99, 100, 101, 1000, 1001])
def test_a_file_in_parts_is_the_file(target: Target, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(folders, "CHUNK", 100)
    data = bytes(n % 251 for n in range(size))
    (target.there / "given").write_bytes(data)
    read = target.folder.upload("a/b", target.there / "given", Pace())
    assert read.bytes == size and (target.there / "a" / "b").read_bytes() == data
    target.folder.within("a").clear()
    assert not (target.there / "a").exists()


def test_a_pace_is_kept_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()
    monkeypatch.setattr(folders.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(folders.time, "sleep", slept.append)
    pace = Pace(10)
    for size in (5, 10, 20):
        pace.wait(size)
    assert slept == [0.0, 0.5, 1.5]
    now[0] = 200.0
    pace.wait(1)
    Pace().wait(1 << 40)
    assert slept[3:] == [0.0]


def test_the_index_has_the_sum_of_the_manifest(target: Target) -> None:
    target.written(1)
    all_of(target.copies())
    path = target.at(1) / store.MANIFEST
    assert target.index().checkpoints["step-00000001"].bytes == sum(
        p.stat().st_size for p in path.parent.iterdir()
    )
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(store.BadCheckpoint, match=r"manifest\.json differs from what was copied"):
        target.steps()


def test_writes_that_come_late_change_nothing(target: Target) -> None:
    """A store may carry out what was given up and sent again, after all that came later."""
    late = list[tuple[Path, bytes | None]]()

    def keep(what: str, url: str) -> None:
        path = Path(url.removeprefix("file://"))
        if what in ("put", "remove"):
            late.append((path, None))

    target.requests.fault = keep
    for step in (1, 2, 3):
        target.written(step)
        all_of(target.copies(keep=1))
        late = [(p, p.read_bytes() if data is None and p.exists() else data) for p, data in late]
    target.requests.fault = lambda what, url: None
    assert target.steps() == [3]
    for path, data in reversed(late):
        path.parent.mkdir(exist_ok=True)
        if data is not None:
            path.write_bytes(data)
    assert target.steps() == [3]
