"""What a rank does now, and what it did; whether a thread waits for other ranks; the job's one failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mm.errors import DataError, PolyrankError
from mm.faults import failure, folder, sites
from mm.faults.failure import Failure
from mm.faults.record import FlightRecord, Window, shown
from mm.train.forward import note_samples
from parallel.comm.waiting import wait_for
from parallel.schedule import Action, Kind

FORWARD = Action(Kind.FORWARD, "vision", 3)


def test_the_last_entry_without_an_end_is_what_a_rank_does() -> None:
    record = FlightRecord(3)
    assert str(record) == "making ready"
    record.step = 17
    with record.doing("evaluation"):
        record.begin(FORWARD)
        assert str(record) == "vision, forward of micro-batch 3 in step 17"
        record.end_action()
        record.end_action()  # of a pair, which has one entry
        assert str(record) == "evaluation in step 17"
    record.begin(Action(Kind.BOUNDARY_BACKWARD, "vision", 2, 1, span=2))
    assert str(record) == "vision stage 1, boundary backward of micro-batches 2 to 3 in step 17"
    record.end()
    for _ in range(2):
        record.begin("update")
        record.end()
    kept = record.to_json()
    assert [e["what"].split(",")[0] for e in kept] == ["vision stage 1", "update", "update"]
    assert all(e["took_s"] >= 0 for e in kept)


def test_where_an_error_left_stays_open() -> None:
    record = FlightRecord()
    with pytest.raises(ValueError), record.doing("data"):
        raise ValueError
    assert str(record) == "data"
    record.forget()
    assert record.now() is None


def test_other_processes_see_what_a_rank_does() -> None:
    record = FlightRecord()
    window = record.window = Window()
    path = Path(f"/proc/self/fd/{window.number}")
    if not path.exists():
        pytest.skip("a system without /proc")
    assert shown(path.read_bytes()) == ""
    record.begin("a much longer thing than what follows")
    record.begin(FORWARD)
    assert shown(path.read_bytes()) == "vision, forward of micro-batch 3"
    record.end()
    assert shown(path.read_bytes()) == "what follows vision, forward of micro-batch 3"
    record.begin("x" * 1000)
    assert set(shown(path.read_bytes())) == {"x"}
    window.close()


def seen_in(call: Callable[[], object], name: str, until: threading.Event) -> sites.Site | None:
    """Where a thread is that carries out a call which waits."""
    thread = threading.Thread(target=call)
    thread.start()
    assert thread.ident is not None
    site, deadline = None, time.monotonic() + 20
    while (site is None or site.name != name) and time.monotonic() < deadline:
        time.sleep(0.01)
        site = sites.site_of(thread.ident)
    until.set()
    thread.join()
    return site


def test_a_thread_at_a_message_waits_and_one_in_a_plug_in_works() -> None:
    work, own = threading.Event(), threading.Event()

    def plug_in() -> None:
        own.wait(60)

    message = partial(wait_for, work, torch.device("meta"), 60.0)  # type: ignore[arg-type]  # it can wait
    at_message, at_work = seen_in(message, "wait_for", work), seen_in(plug_in, "plug_in", own)
    assert at_message is not None and (at_message.name, at_message.waits) == ("wait_for", True)
    assert at_work is not None and (at_work.name, at_work.waits) == ("plug_in", False)
    assert sites.waits_at(dist.distributed_c10d.__file__, 1)
    assert not sites.waits_at(torch.nn.__file__, 1)


def test_an_error_at_a_message_may_be_anothers_fault() -> None:
    class Broken:
        def wait(self, limit: object = None) -> None:
            raise RuntimeError("third_party/gloo: Connection closed by peer")

    with pytest.raises(RuntimeError) as caught:
        wait_for(Broken(), torch.device("cpu"), 1.0)  # type: ignore[arg-type]
    told = PolyrankError("no word from rank 1")
    told.__cause__ = caught.value
    assert sites.broke_at_exchange(caught.value) and sites.broke_at_exchange(told)
    assert not sites.broke_at_exchange(RuntimeError("odd shapes"))


def test_the_first_failure_is_the_jobs() -> None:
    store = dist.HashStore()
    failure.prepare(store)
    failure.prepare(store)
    assert failure.read(store.get(failure.KEY)) is None
    first, second = Failure("rank 1: x", 1, 3, 1), Failure("rank 0: y", 0, 1, 0)
    assert failure.tell(store, first) == first
    assert failure.tell(store, second) == first == failure.read(store.get(failure.KEY))


def test_a_message_names_rank_action_and_sample() -> None:
    where = "vision, forward of micro-batch 3 in step 17"
    error = ValueError("odd")
    error.add_note("its samples: a")
    assert folder.message(error, 1, where, True) == f"rank 1: {where}: ValueError: odd; its samples: a"
    known = DataError("module vision, sample a: odd")
    assert folder.message(known, 1, where, True) == f"DataError: rank 1, {where}: {known}"
    assert folder.message(known, 1, where, False) == f"DataError: {known}"  # all ranks raise it alike


def test_an_error_tells_its_first_samples_and_none_where_there_are_none() -> None:
    for names, notes in (
        ([], []),
        (["a"], ["its samples: a"]),
        (list("abcdef"), ["its samples: a, b, c, d and 2 more"]),
    ):
        error = ValueError("odd")
        note_samples(error, names)
        assert getattr(error, "__notes__", []) == notes
