"""What a rank's heartbeat sees besides the rank: other machines, and the agent that started it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from mm.faults import failure, heartbeat
from mm.faults.blame import SILENT_S, Post
from mm.faults.heartbeat import Heartbeat, Place
from mm.faults.record import FlightRecord
from mm.faults.stacks import this_machine
from mm.faults.watch import About, Watch, about_key, post_key


def until(what: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 20
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(what())


def beating(folder: Path, store: dist.Store, agent: int) -> Heartbeat:
    place = Place(0, 1, True, 60.0, "127.0.0.1:1", agent)
    return Heartbeat(place, lambda: store, FlightRecord(), folder)


def test_a_rank_whose_agent_has_ended_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "GRACE_S", 1e6)  # then it would end this process
    store, gone = dist.HashStore(), os.getppid() + 1
    with beating(tmp_path, store, gone) as beats:
        assert until(lambda: beats._failure)
    failed = failure.read(store.get(failure.KEY))
    assert failed is not None and (failed.rank, failed.code) == (0, 1)
    assert f"rank 0 has lost torchrun's agent (process {gone})" in failed.text
    assert failed.text in capsys.readouterr().err and (tmp_path / "faults" / "rank-0.txt").exists()


@pytest.mark.parametrize("agent", [0, os.getppid()], ids=["none", "its own"])
def test_a_rank_goes_on_with_its_agent_or_without_any(agent: int, tmp_path: Path) -> None:
    store = dist.HashStore()
    failure.prepare(store)
    with beating(tmp_path, store, agent):
        # Two beats: the first one has looked for the agent.
        assert until(lambda: store.check([post_key(0)]) and '"number": 2' in store.get(post_key(0)).decode())
        about = About(**json.loads(store.get(about_key(0))))
    assert failure.read(store.get(failure.KEY)) is None
    assert about.host == this_machine() and about.pid == os.getpid()


def test_a_rank_of_another_machine_is_not_looked_up_here() -> None:
    """Its process id is another process's here, or nobody's."""
    store, nobody = dist.HashStore(), 2**22 + 1
    here = Watch(store, 0, 2, About(this_machine(), os.getpid(), 0, 0, "a"))
    Watch(store, 1, 2, About("elsewhere", nobody, 0, 0, "node7"))
    for rank in range(2):
        store.set(post_key(rank), Post(1, "llm, forward", waits=rank == 0, still_s=9.0).dump())
    here.read(range(2), post_key(0))
    assert not here._seen(1).ended
    here._since -= 9.0
    here._posts[1] = here._posts[1][0], time.monotonic() - 2 * SILENT_S - 9.0
    verdict = here.judge(lambda: False)
    assert verdict is not None and verdict.rank == 1 and "its machine node7 is cut off" in verdict.why
