"""Where ranks meet: who is missing is named, and a launch has a name."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from mm.errors import PolyrankError, Refused
from mm.ranks import rendezvous


def test_the_first_rank_tells_which_have_not_started_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import HashStore

    store = HashStore()
    monkeypatch.setattr(rendezvous, "connect", lambda timeout_s, hosts: store)
    monkeypatch.setattr(rendezvous, "PROGRESS_S", 0.1)
    with pytest.raises(
        PolyrankError, match=r"2 of 3 ranks have not come within 0.35 s \(run.timeout_s\): 1, 2"
    ):
        rendezvous.meet(0, 3, 0.35)
    assert capsys.readouterr().out.count("1 of 3 ranks have started, not yet: 1, 2\n") >= 2
    store.set("here/2", "")
    threading.Timer(0.25, lambda: store.set("here/1", "")).start()
    rendezvous.meet(0, 3, 60.0)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 of 3 ranks have started, not yet: 1" and printed[-1] == "all 3 ranks have started"
    rendezvous.meet(1, 3, 60.0)
    assert capsys.readouterr().out == ""


def test_a_launch_has_one_name_however_often_its_ranks_are_started() -> None:
    from torch.distributed import HashStore, PrefixStore

    kept = HashStore()  # torchrun's store outlives the ranks
    first, again = rendezvous.name_launch(PrefixStore("polyrank/0", kept))
    assert first and not again
    assert rendezvous.name_launch(PrefixStore("polyrank/1", kept)) == (first, True)
    assert rendezvous.name_launch(PrefixStore("polyrank/0", HashStore()))[0] != first


def test_a_port_of_a_program_that_says_nothing_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel connects, and nobody answers
        port = str(mute.getsockname()[1])
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(rendezvous, "SPARE_S", 0.1)
        start = time.monotonic()
        with pytest.raises(
            PolyrankError, match=rf"rank 1 does not reach .* at 127\.0\.0\.1:{port} within"
        ) as caught:
            rendezvous.meet(1, 2, 0.3)
        assert time.monotonic() - start < 9
        assert "something listens there" in str(caught.value) and "MASTER_PORT" in str(caught.value)


def test_a_store_that_no_longer_answers_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks have met there, and its machine is cut off: torch waits for an answer without a bound."""
    over = threading.Event()

    class CutOff:
        def compare_set(self, key: str, old: str, new: str) -> bytes:
            return new.encode()

        def set(self, key: str, value: str) -> None:
            pass

        def wait(self, keys: list[str], timeout: object) -> None:
            over.wait(5)

    monkeypatch.setattr(rendezvous, "connect", lambda timeout_s, hosts: CutOff())
    monkeypatch.setattr(rendezvous, "SPARE_S", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "10.77.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    start = time.monotonic()
    with pytest.raises(
        PolyrankError, match=r"rank 1 has reached the job's store at 10\.77\.0\.1:29500, .* no longer answers"
    ):
        rendezvous.meet(1, 2, 0.2)
    over.set()
    assert time.monotonic() - start < 9


@pytest.mark.parametrize("served", [True, False])
def test_only_a_store_that_outlives_ranks_has_a_part_for_each_start(
    served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that was started later counts other restarts than the one that has stayed."""
    from torch.distributed import HashStore

    store = HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(served))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    rendezvous.of_start(store).set("key", "of the agent that has stayed")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert rendezvous.of_start(store).check(["key"]) is not served


@pytest.mark.parametrize(
    ("rank", "world", "waiting", "words"),
    [
        (1, 3, 0, "WORLD_SIZE is 2 on rank 0 and 3 on rank 1"),
        (2, 2, None, "RANK=2 with WORLD_SIZE=2; needed: ranks from 0 to 1"),
        (1, 2, 0, "two processes have RANK=1: process 7 on elsewhere, and process"),
    ],
)
def test_ranks_that_are_no_job_are_named_on_all_at_once(
    rank: int, world: int, waiting: int | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import HashStore

    store = HashStore()
    monkeypatch.setattr(rendezvous, "connect", lambda timeout_s, hosts: store)
    store.compare_set("first", "", "[0, 2]")
    store.compare_set("process/1", "", "process 7 on elsewhere")
    start = time.monotonic()
    with pytest.raises(Refused, match=words):
        rendezvous.meet(rank, world, 10.0)
    if waiting is not None:  # who waits already is told the same
        with pytest.raises(Refused, match=words):
            rendezvous.meet(waiting, 2, 10.0)
    assert time.monotonic() - start < 9
