"""The process that copies: it dies, its target cannot be written, and training never stops for it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mm.checkpoint.remote import copier as copying
from mm.checkpoint.remote.copier import Copier
from mm.checkpoint.remote.copies import write_index
from mm.checkpoint.remote.index import RemoteIndex
from mm.checkpoint.remote.note import Note, read_note, write_note
from mm.config.schema import CheckpointConfig
from tests.mm.checkpoint.remote.targets import Target, target_in


@pytest.fixture
def target(tmp_path: Path, processes: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    monkeypatch.setattr(copying, "AGAIN_S", 0.01)
    target = target_in(tmp_path)
    write_index(target.folder, RemoteIndex("r"))
    yield target


def copier_of(target: Target, said: list[str], **remote: Any) -> Copier:
    copier = Copier(target.run, CheckpointConfig(keep=2, remote={"url": target.folder.url, **remote}))
    copier.info = copier.warn = said.append
    return copier


def until(met: Callable[[], bool], copier: Copier) -> None:
    deadline = time.monotonic() + 60
    while not met():
        copier.hear(0.05)
        assert time.monotonic() < deadline


def pid_of(target: Target, copier: Copier) -> int:
    """The process that copies: the only child of the one that starts it."""
    (child,) = Path(f"/proc/{copier._nursery.pid}/task/{copier._nursery.pid}/children").read_text().split()
    return int(child)


def test_a_killed_process_is_said_once_and_another_goes_on(target: Target) -> None:
    said = list[str]()
    with closing(copier_of(target, said)) as copier:
        copier.begin("r", 0)
        until(lambda: not copier.busy, copier)
        write_note(target.run, Note("r", "step-00000009"))  # what it was copying when it ended
        os.kill(pid_of(target, copier), signal.SIGKILL)
        target.written(1)
        copier.wake()
        until(lambda: bool(said), copier)
        assert "the process that copies has ended; training goes on" in said[0]
        copier.wake()
        until(lambda: not copier.busy, copier)
        assert said[1:] == [f"checkpoints are copied to {target.folder.url} again"]
        assert read_note(target.run) == Note("r")
    assert target.steps() == [1]


def test_a_target_that_cannot_be_written_is_said_once(target: Target) -> None:
    said = list[str]()
    lost = target.run.parent / "elsewhere"
    target.there.rename(lost)
    target.there.write_text("a file where a folder must be")
    with closing(copier_of(target, said)) as copier:
        copier.begin("r", 0)
        for step in (1, 2, 3):
            target.written(step)
        for _ in range(3):
            copier.wake()
            until(lambda: not copier.busy, copier)
        assert len(said) == 1 and "a checkpoint cannot be copied" in said[0] and target.folder.url in said[0]
        begun = time.monotonic()
        target.there.unlink()
        lost.rename(target.there)
        while not copier.last(begun):
            pass
    assert said[1:] == [
        f"checkpoints are copied to {target.folder.url} again",
        f"copied to {target.folder.url}: step-00000003",
    ]
    assert target.steps() == [3]


def test_a_job_waits_for_the_last_copy_as_long_as_it_is_told(target: Target) -> None:
    said = list[str]()
    target.written(1)
    shutil.rmtree(target.there)
    target.there.write_text("a file")
    with closing(copier_of(target, said, wait_s=0.3)) as copier:
        copier.begin("r", 0)
        begun = time.monotonic()
        while not copier.last(begun):
            pass
        assert 0.3 <= time.monotonic() - begun < 5
    assert said[-1].startswith(f"the last checkpoint is not copied to {target.folder.url} after 0.3 s")
