"""Messages between stages: what is kept of those under way, and who is named when one is not taken."""

from __future__ import annotations

import gc
import time
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.comm.pipeline import Pipe


class Work:
    """A message under way."""

    waited = False

    def wait(self, timeout: timedelta) -> None:
        self.waited = True


def test_messages_are_kept_until_they_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    works: list[Work] = []

    def isend(x: torch.Tensor, peer: int, **how: Any) -> Work:
        works.append(Work())
        return works[-1]

    monkeypatch.setattr(dist, "isend", isend)
    group: Any = object()
    pipe = Pipe("llm", group, 1.0)
    sent = [torch.ones(3) for _ in range(3)]
    gone = [weakref.ref(x) for x in sent]
    for k in range(3):
        pipe.send(sent.pop(), 1 + k % 2, k)
    pipe.send(torch.ones(0), 1, 7)  # empty: never sent
    gc.collect()
    assert all(ref() is not None for ref in gone)
    pipe.release(2, 1)
    pipe.release(1, 7)
    gc.collect()
    assert [w.waited for w in works] == [False, True, False]
    assert [ref() is None for ref in gone] == [False, True, False]
    pipe.finish()
    assert all(w.waited for w in works) and all(ref() is None for ref in gone)


def there_and_back() -> list[float]:
    pipe, rank = Pipe("llm", dist.group.WORLD, 10.0), dist.get_rank()
    other = 1 - rank
    waits = [
        pipe.receive((2, k), other, k, dtype=torch.float64, device=torch.device("cpu")) for k in range(4)
    ]
    for k in reversed(range(4)):
        pipe.send(torch.full((2, k), 10.0 * rank + k, dtype=torch.float64), other, k)
    got = [w() for w in waits]
    pipe.finish()
    return [float(x.mean()) if x.numel() else -1.0 for x in got]


def test_tags_tell_messages_apart(ranks: Any) -> None:
    assert ranks(2, there_and_back) == [[-1.0, 11.0, 12.0, 13.0], [-1.0, 1.0, 2.0, 3.0]]


def waits_in_vain() -> str:
    if dist.get_rank() == 1:
        time.sleep(2.5)  # alive, but sends nothing
        return ""
    pipe = Pipe("llm", dist.group.WORLD, 1.0)
    wait = pipe.receive((2, 2), 1, 0, dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(RuntimeError) as error:
        wait()
    return str(error.value)


def test_a_silent_stage_is_named(ranks: Any) -> None:
    assert "pipeline llm: rank 1 did not send within 1 s" in ranks(2, waits_in_vain, timeout=20)[0]
