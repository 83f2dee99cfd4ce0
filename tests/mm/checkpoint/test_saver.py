"""A job trains on while its checkpoint is written, which is of the step that it was begun at, or of none."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm.checkpoint import saver as saving
from mm.checkpoint.saver import Saver
from mm.checkpoint.state import state_tensors
from mm.checkpoint.sums import SUMS
from mm.errors import CheckpointError
from mm.ranks.control import Control
from mm.train.one_step import train_step
from parallel import checkpoint as store
from tests.mm.checkpoint.runs import contents
from tests.mm.harness import running, small

TRAIN = {"steps": 9, "global_batch": 4, "average": 0.9}
LAYOUT = {"llm": {"ranks": [1, 0], "tp": 2, "ep": 2}, "vision": {"ranks": [1]}}


def move_away(raw: dict[str, Any], folder: str) -> str:
    """Save where the run's folder has been renamed since the save before; what is told."""
    directory = Path(folder, "run")
    with (
        running(raw) as (job, feed),
        closing(Saver(job.blueprint, feed.index, directory, job.rank.rank)) as saver,
    ):
        train_step(job, feed, 0)
        saver.start(job, 1, feed.bad)
        saver.wait(job)
        directory.rename(Path(folder, "renamed"))
        saver.start(job, 2, feed.bad)
        with pytest.raises(CheckpointError) as caught:
            saver.wait(job)
    return str(caught.value)


def test_a_folder_that_was_moved_away_is_told_and_not_begun_anew(ranks: Any, tmp_path: Path) -> None:
    (told,) = ranks(1, move_away, small(train=TRAIN), str(tmp_path))
    assert "the checkpoint of step 2 cannot be written" in told and "No such file" in told
    assert not (tmp_path / "run").exists() and store.published(tmp_path / "renamed")


def pid_of(saver: Saver) -> int:
    return saver._writer._pid


def train_beside(raw: dict[str, Any], folder: str) -> tuple[bool, bool]:
    """Save after step 2 with a writer that stands still until step 4 is done; whether anything was published
    before, and whether steps draw from torch's generator."""
    with running(raw) as (job, feed):
        before = torch.get_rng_state()
        with closing(Saver(job.blueprint, feed.index, Path(folder, "beside"), job.rank.rank)) as saver:
            for step in range(2):
                train_step(job, feed, step)
            os.kill(pid_of(saver), signal.SIGSTOP)
            saver.start(job, 2, feed.bad, feed.drawn)
            saving.save(job, feed.index, Path(folder, "waited"), 2, feed.bad, feed.drawn)
            store.save(Path(folder, "plain"), 2, state_tensors(job), {}, keep=0)  # without a copy
            for step in range(2, 4):
                train_step(job, feed, step)
                assert not saver.check(job)
            early = bool(store.published(Path(folder, "beside")))
            os.kill(pid_of(saver), signal.SIGCONT)
            saver.wait(job)
            assert saver.step == 2
        return early, not torch.equal(torch.get_rng_state(), before)


def test_it_holds_the_step_that_it_was_begun_at(ranks: Any, tmp_path: Path) -> None:
    """Also: no step draws from torch's generator, so a checkpoint has no state of one."""
    found = ranks(2, train_beside, small(train=TRAIN, layout=LAYOUT), str(tmp_path))
    assert found == [(False, False)] * 2
    ours, theirs = (store.published(tmp_path / name)[0] for name in ("beside", "waited"))
    assert not store.verify(ours)
    assert store.read_state(ours) == store.read_state(theirs)
    plain = contents(store.published(tmp_path / "plain")[0])
    assert all(torch.equal(tensor, plain[name]) for name, tensor in contents(ours).items())
    given, wanted = contents(ours), contents(theirs)
    assert given.keys() == wanted.keys() and any(".average." in name for name in given)
    assert [name for name in given if not torch.equal(given[name], wanted[name])] == []
    assert (tmp_path / "beside" / store.LATEST).read_text() == "step-00000002\n"


class Asked(Exception):
    """A message was sent."""


def ask(control: Control, mine: str) -> list[str]:
    raise Asked


def prepare_twice(raw: dict[str, Any], folder: str) -> tuple[bool, int | None]:
    """Whether some rank plans again what is planned, and the step that was saved."""
    with (
        running(raw) as (job, feed),
        closing(Saver(job.blueprint, feed.index, Path(folder), job.rank.rank)) as saver,
    ):
        train_step(job, feed, 0)
        saver.prepare(job)
        again = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Control, "tell", ask)
            try:
                saver.prepare(job)
            except Asked:
                again = True
        if job.control.any(again):
            return True, None
        saver.start(job, 1, feed.bad)
        saver.wait(job)
        return False, saver.step


def test_a_rank_that_no_module_names_plans_once_too(ranks: Any, tmp_path: Path) -> None:
    """Its share is empty. Were that planned after each step, its messages would meet others' next ones."""
    layout = {module: {"ranks": [0]} for module in ("llm", "vision", "audio")}
    assert ranks(2, prepare_twice, small(train=TRAIN, layout=layout), str(tmp_path)) == [(False, 1)] * 2
    assert not store.verify(store.published(tmp_path)[0])


def fail(raw: dict[str, Any], folder: str, how: str) -> tuple[list[str], list[str], int | None]:
    """Save twice, the second time with a writer of rank 1 that fails, and once more: what all ranks are told,
    what lies in the folder after the failure, and the last step that was saved."""
    told, directory = list[str](), Path(folder)
    with (
        running(raw) as (job, feed),
        closing(Saver(job.blueprint, feed.index, directory, job.rank.rank)) as saver,
    ):
        saver.warn = told.append
        train_step(job, feed, 0)
        saver.start(job, 1, feed.bad)
        saver.wait(job)
        if job.rank.rank == 1:
            HOW[how](saver)
        saver.start(job, 2, feed.bad)
        try:
            saver.wait(job)
        except CheckpointError as error:
            told.append(str(error))
        dist.barrier()
        left = sorted(p.name for p in directory.iterdir())
        dist.barrier()
        saver._writer._silent_s = job.blueprint.cfg.run.timeout_s  # a busy machine is no silent process
        saver.start(job, 3, feed.bad)
        saver.wait(job)
        return told, left, saver.step


def no_room(saver: Saver) -> None:
    resource.prlimit(pid_of(saver), resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


def killed(saver: Saver) -> None:
    os.kill(pid_of(saver), signal.SIGKILL)
    time.sleep(0.05)


def silent(saver: Saver) -> None:
    saver._writer._silent_s = 0.2
    os.kill(pid_of(saver), signal.SIGSTOP)


HOW = {"full": no_room, "killed": killed, "silent": silent}
WORDS = {
    "full": r"rank 1: .*File too large.*MiB free",
    "killed": "rank 1: the process that writes has ended with exit code -9: the machine may",
    "silent": "rank 1: nothing has been written for 0.2 s",
}


@pytest.mark.parametrize("how", HOW)
def test_what_one_rank_cannot_write_is_told_on_all_and_removed(how: str, ranks: Any, tmp_path: Path) -> None:
    after = "continue" if how == "full" else "end"
    raw = small(train=TRAIN, layout=LAYOUT, checkpoint={"on_failure": after})
    (first, left, last), (second, _, _) = ranks(2, fail, raw, str(tmp_path), how)
    assert left == [store.LATEST, SUMS, "step-00000001"]
    assert last == 3 and store.published(tmp_path)[-1].name == "step-00000003"
    assert first == second if after == "end" else second == []
    (text,) = first
    assert text.startswith(f"the checkpoint of step 2 cannot be written to {tmp_path}: ")
    assert re.search(WORDS[how], text), text
