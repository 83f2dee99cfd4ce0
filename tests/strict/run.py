"""Runs a function on ranks under the rules: strict(n, fn, *args, eager=.., timeout=..)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from tests.pool import Pool, RankFailed
from tests.strict.group import BACKEND, Options, StrictGroup, register
from tests.strict.link import Link
from tests.strict.server import Server

LATER_S = 3.0  # the pool's limit is that much later, so that ranks can say what they wait for


class Hang(RankFailed):
    """A run that was cut off, because its ranks waited for each other or broke a rule of NCCL."""


def run_strict(
    pool: Pool, n: int, fn: Callable[..., Any], *args: Any, eager: bool = False, timeout: float = 120.0
) -> list[Any]:
    """fn(*args) on n ranks under NCCL's rules; results in rank order.

    eager: whether groups are bound to the device, and so have one communicator for all messages; else
    unbatched messages have one for each pair of ranks. timeout: the longest wait in seconds. Where all ranks
    wait for others the run is cut off at once.

    Raises Hang with what every rank waits for; RankFailed for other failures.
    """
    server = Server(n, eager=eager)
    begin = partial(begin_strict, server.address, eager, timeout)
    try:
        return pool.run(n, refereed, fn, *args, timeout=timeout + LATER_S, begin=begin)
    except RankFailed as error:
        if server.verdict is not None:
            raise Hang(server.verdict) from error
        raise
    finally:
        server.close()


def begin_strict(
    address: str, eager: bool, limit: float, rank: int, world: int, store: str, timeout: float
) -> None:
    """Make the default group of a rank. limit: its longest wait; timeout: that of torch's own waits."""
    register()
    link = Link(address, rank, eager=eager, timeout_s=limit)
    dist.init_process_group(
        BACKEND,
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
        pg_options=Options(link),
    )


def refereed(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), then tell the referee that this rank has ended."""
    group = dist.group.WORLD
    assert isinstance(group, StrictGroup)
    try:
        return fn(*args)
    finally:
        group.link.close()
