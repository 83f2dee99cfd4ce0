"""Workers that decode: equal results for any number of them, and what happens when they die or hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.data.reader import BadSample
from mm.data.sample import Part, Sample
from mm.errors import PolyrankError
from mm.ranks import workers as pool
from mm.ranks.decoding import Decode, Decoded, Task, Texts, attempt
from mm.ranks.workers import Workers
from tests.mm.harness import small, train_few
from tests.mm.ranks.test_planner import ended

KINDS = ("float32", "bfloat16", "float64", "uint8", "int64", "bool")


def task(n: int, name: str = "i.png") -> Task:
    part = Part(f"a-{n % 3}.tar", name, 512 * (97 * n % 31), 10, "", {"n": n})
    return Task("vision", Sample(n, f"s{n}", part.shard, (), part), part)


def made(one: Task, place: Tensor | None = None) -> Tensor | Texts:
    """Results of all kinds and sizes, and bad samples; some are written where they belong."""
    n = one.sample.id
    if n % 7 == 3:
        raise BadSample(one.sample, f"torn {n}")
    if n % 5 == 1:
        return [np.arange(k, dtype=np.int64) + n for k in range(n % 4)]
    shape = (n % 4, 3, 1 + n % 3) if n % 2 else ()
    values = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape) + n
    values = values.to(getattr(torch, KINDS[n % len(KINDS)]))
    if place is not None and place.nbytes == values.nbytes and n % 3:
        return place.reshape(-1).view(torch.uint8).view(values.dtype).view(values.shape).copy_(values)
    return values


class Deadly(Part):
    """A payload that ends who receives its task, before it is begun."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


@contextmanager
def workers(decode: Decode, count: int, timeout_s: float = 20.0) -> Iterator[Workers]:
    one = Workers(decode, count, 4, timeout_s)
    pids = one.pids
    try:
        yield one
        pids += one.pids
    finally:
        one.close()
    assert all(ended(pid, 2.0) for pid in pids)


def plain(found: list[Decoded]) -> list[object]:
    """Results as values that can be compared."""

    def one(x: Decoded) -> object:
        if isinstance(x, BadSample):
            return (str(x), x.sample_id)
        if isinstance(x, Tensor):
            return (x.dtype, tuple(x.shape), x.double().flatten().tolist())
        return [(own.dtype, own.tolist()) for own in x]

    return [one(x) for x in found]


def places(expected: list[Decoded], one: Workers) -> list[Tensor | None]:
    """Memory for results, shared with workers or not: some fits, some has another shape or dtype."""
    found: list[Tensor | None] = []
    for n, x in enumerate(expected):
        like = x if isinstance(x, Tensor) else torch.ones(2)
        if n % 5 == 4:  # as many bytes
            like = like.reshape(-1).view(torch.uint8)
        shape, dtype = ((n % 2, 7), torch.int16) if n % 3 == 0 else (tuple(like.shape), like.dtype)
        found.append((one.empty(shape, dtype) if n % 2 else torch.empty(shape, dtype=dtype)).fill_(1))
    return found


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_workers_gives_the_same(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TRAY_BYTES", 1 << 13)
    sizes, tasks = [0, 1, 50, 3, 8], [task(n) for n in range(60)]
    large = task(90, "large")

    def decode(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        # Some fill a tray nearly, and one is larger than a tray.
        if one.part.name == "large":
            return torch.arange(9_000)
        return (
            torch.full((7_000,), one.sample.id, dtype=torch.uint8) if one.sample.id > 50 else made(one, place)
        )

    alone = Workers(decode, 0, 0, 1.0)
    direct = alone.results(alone.submit([*tasks, large]))
    expected = plain(direct)
    with workers(decode, count) as one:
        tickets = [one.submit([*tasks, large][:n]) for n in sizes]
        one.forget(tickets.pop(2))
        tickets.append(one.submit([*tasks, large]))
        tickets.append(one.submit([*tasks, large], places(direct, one)))
        # All are looked at when the trays have been used again.
        found = [one.results(ticket) for ticket in tickets]
        assert [plain(own) for own in found] == [expected[: len(ticket.tasks)] for ticket in tickets]
        used = [a is b for a, b in zip(found[-1], tickets[-1].places, strict=True)]
        assert any(used) == bool(count)
        assert not one.notes()


def fed(raw: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    keys = ("loss", "grad_norm_by_module", "tokens", "loss_by_modality", "skipped_items")
    return [{k: m[k] for k in keys} for m in train_few(raw, steps)]


@pytest.mark.slow
def test_a_job_learns_the_same_with_any_number_of_workers(ranks: Any) -> None:
    found = [ranks(2, fed, small(data={"workers": n}), 3) for n in (0, 1, 3)]
    assert found[1:] == found[:1] * 2


def test_workers_that_die_are_named_and_replaced() -> None:
    kills: dict[str, Callable[[], object]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "left": lambda: os._exit(7),
    }

    def decode(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        if one.part.name in kills:
            kills[one.part.name]()
        return made(one, place)

    tasks = [task(n, {5: "killed", 12: "left"}.get(n, "i.png")) for n in range(20)]
    with workers(decode, 2) as one:
        found = one.results(one.submit(tasks))
        notes = one.notes()
        for n, name, how in ((5, "killed", "was ended by SIGKILL"), (12, "left", "ended with exit code 7")):
            said = [x for x in notes if name in x]
            assert len(said) == 2, notes  # at the second it counts as bad
            what = f"of rank 4 {how} while it decoded {name} of sample s{n} of a-{n % 3}.tar; "
            assert all(what in x for x in said)
            bad = found[n]
            assert isinstance(bad, BadSample) and "2 workers have ended at it" in bad.why and how in bad.why
        others = [n for n in range(20) if n not in (5, 12)]
        assert plain([found[n] for n in others]) == plain([attempt(made, task(n)) for n in others])
        os.kill(one.pids[0], signal.SIGKILL)  # between steps
        again = one.results(one.submit(tasks[:5]))
        assert plain(again) == plain(found[:5])
        assert [x for x in one.notes() if "between tasks" in x]


def test_a_worker_that_dies_once_costs_no_sample(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def decode(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        if one.sample.id == 6 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return made(one, place)

    with workers(decode, 1) as one:
        found = one.results(one.submit([task(n) for n in range(12)]))
        assert plain(found) == plain([attempt(made, task(n)) for n in range(12)])
        (note,) = one.notes()
        assert "was ended by SIGSEGV while it decoded i.png of sample s6" in note


def test_a_worker_that_hangs_is_killed() -> None:
    def decode(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        if one.sample.id == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return made(one, place)

    with workers(decode, 2, timeout_s=0.4) as one:
        found = one.results(one.submit([task(n) for n in range(9)]))
        assert [n for n, x in enumerate(found) if "workers have ended" in str(x)] == [2]
        notes = one.notes()
        assert len(notes) == 2 and all("(it had not answered for 0.4 s) while it decoded" in x for x in notes)


def test_a_feed_that_is_closed_waits_for_no_worker() -> None:
    def hang(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        time.sleep(100)
        raise AssertionError

    with workers(hang, 1, timeout_s=60.0) as one, ThreadPoolExecutor(1) as thread:
        waits = thread.submit(one.results, one.submit([task(1)]))
        one.stop()
        with pytest.raises(PolyrankError, match="are to end"):
            waits.result(20)


def test_faults_of_ours_are_no_bad_samples() -> None:
    def fault(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        return [][one.sample.id]

    with workers(fault, 1) as one, pytest.raises(PolyrankError, match=r"(?s)of sample s1 .*IndexError"):
        one.results(one.submit([task(1)]))
    deadly = Task("vision", task(1).sample, Deadly("a-1.tar", "i.png", 0, 10, "", {}))
    with workers(made, 2) as one, pytest.raises(PolyrankError, match="5 workers in a row have ended"):
        one.results(one.submit([deadly]))


def test_workers_end_with_their_rank() -> None:
    def hang(one: Task, place: Tensor | None = None) -> Tensor | Texts:
        time.sleep(100)
        raise AssertionError

    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a rank that ends at once, without a word to its workers
        one = Workers(hang, 3, 4, 60.0)
        one.submit([task(1)])
        assert one._nursery is not None
        os.write(write, " ".join(map(str, [one._nursery.pid, *one.pids])).encode())
        os._exit(0)
    os.waitpid(child, 0)
    pids = [int(n) for n in os.read(read, 100).split()]
    os.close(read), os.close(write)
    assert len(pids) == 4 and all(ended(pid, 5.0) for pid in pids)
    with workers(made, 2) as one:
        for pid in one.pids:  # to all processes of a job: the rank decides
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        one.results(one.submit([task(n) for n in range(8)]))
        assert not one.notes()
