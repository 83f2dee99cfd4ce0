"""Where the ranks of a job meet: the store of torchrun, of launch_local, or of rank 0."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mm.config.flat import said
from mm.errors import PolyrankError, Refused

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, not in __all__

T = TypeVar("T")
SPARE_S = 1.0  # that the store has to tell of its own timeout
MOST = 6  # keys, values and ranks that a message lists
PROGRESS_S = 5.0  # seconds between two lines that name what is being waited for


def connect(timeout_s: float, *, hosts: bool = False) -> PrefixStore:
    """The store of the rendezvous, prefixed for this start of the ranks; hosts: this process serves it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def reach() -> PrefixStore:
        listener = _listener(address, port) if hosts else None
        store = TCPStore(
            address,
            port,
            int(os.environ["WORLD_SIZE"]),
            is_master=hosts,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        return of_start(store)

    return _bounded(reach, timeout_s + SPARE_S, _MUTE)


def of_start(store: Store) -> PrefixStore:
    """The store as the ranks of this start see it: they must not read the keys of those before them.

    An agent's store outlives the ranks. One that rank 0 serves does not: agents of torchrun that were started
    at different times count restarts differently, and their ranks meet there all the same.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, not in __all__

    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_serves() else "0"
    return PrefixStore(f"polyrank/{count}", store)


def agent_serves() -> bool:
    """Whether torchrun or launch_local serves the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listener(address: str, port: int) -> socket.socket | None:
    """A socket that listens at this address alone: torch's own listens at all addresses of the machine. None
    where the address is not one of this machine's own, but leads to it. Raises RuntimeError where the port is
    taken."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address, port), family=family, backlog=4096)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RuntimeError(f"the port is taken: {error.strerror}") from error
        return None


def _bounded(act: Callable[[], T], timeout_s: float, why: str) -> T:
    """What act() gives. Raises RuntimeError, which says why, where it takes longer, and leaves it to itself:
    torch's store waits without a bound for an answer, of a port that something else listens on, or of a
    machine that is cut off."""
    box: list[T | BaseException] = []

    def run() -> None:
        try:
            box.append(act())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not box:
        raise RuntimeError(why)
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def name_launch(store: PrefixStore) -> tuple[str, bool]:
    """A name of this launch, and whether an earlier start of its ranks has made it."""
    own = uuid.uuid4().hex
    # Without the prefix of this start: torchrun's store outlives the ranks that it starts again.
    name = store.underlying_store.compare_set("polyrank/launch", "", own).decode()
    return name, name != own


def meet(rank: int, world: int, timeout_s: float) -> PrefixStore:
    """The job's store, once every rank has come to it. Raises PolyrankError naming those that have not, and
    Refused where processes that were started by hand are no ranks of one job."""
    if not 0 <= rank < world:
        raise Refused(f"RANK={rank} with WORLD_SIZE={world}; needed: ranks from 0 to {world - 1}, each once")
    try:
        store = connect(timeout_s, hosts=rank == 0 and not agent_serves())
    except RuntimeError as error:
        raise PolyrankError(
            f"rank {rank} does not reach the job's store at {at()} within {timeout_s:g} s (run.timeout_s): "
            f"{str(error).splitlines()[0]}; needed: rank 0 or torchrun at that address, and a port that no "
            "other program has (MASTER_PORT, or --rdzv-endpoint of torchrun)"
        ) from error
    try:
        return _bounded(partial(_all_here, store, rank, world, timeout_s), timeout_s + 2 * SPARE_S, _CUT_OFF)
    except RuntimeError as error:
        raise PolyrankError(
            f"rank {rank} has reached the job's store at {at()}, and has lost it while it waited for the "
            f"other ranks ({str(error).splitlines()[0]})"
        ) from error


_MUTE = "something listens there that does not answer as a store does"
_CUT_OFF = "it no longer answers: its machine is cut off, or hangs"


def at() -> str:
    """The address of the job's store."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _all_here(store: PrefixStore, rank: int, world: int, timeout_s: float) -> PrefixStore:
    """The store, once every rank has come to it."""
    if not agent_serves():  # an agent numbers its ranks, and its store outlives other numbers of them
        _take_place(store, rank, world)
    keys = [f"here/{r}" for r in range(world)]
    store.set(keys[rank], "")
    start = time.monotonic()
    while True:
        left = max(0.001, start + timeout_s - time.monotonic())
        try:
            store.wait(keys, timedelta(seconds=min(left, PROGRESS_S) if rank == 0 else left))
        except RuntimeError as error:
            absent = [r for r, key in enumerate(keys) if not store.check([key])]
            some = ", ".join(map(str, absent[:8])) + (", .." if len(absent) > 8 else "")
            if rank == 0 and time.monotonic() < start + timeout_s:
                print(f"{world - len(absent)} of {world} ranks have started, not yet: {some}", flush=True)
                continue
            raise PolyrankError(
                f"{len(absent)} of {world} ranks have not come within {timeout_s:g} s (run.timeout_s): "
                f"{some}; start all of them, with one rendezvous, or wait longer"
            ) from error
        if store.check([_WRONG]):
            raise Refused(store.get(_WRONG).decode())
        if rank == 0 and world > 1:
            print(f"all {world} ranks have started", flush=True)
        return store


_WRONG = "wrong"  # key of the store: why those that come are no job


def _take_place(store: Store, rank: int, world: int) -> None:
    """Come as a rank that no other process is. Raises Refused, here and on those that wait, where one is, or
    where the first that came belongs to a job of another size."""
    first = json.loads(store.compare_set("first", "", json.dumps([rank, world])))
    process = f"process {os.getpid()} on {socket.gethostname()}"
    other = store.compare_set(f"process/{rank}", "", process).decode()
    if first[1] != world:
        why = f"WORLD_SIZE is {first[1]} on rank {first[0]} and {world} on rank {rank}"
    elif other != process:
        why = f"two processes have RANK={rank}: {other}, and {process}"
    else:
        return
    why += f"; needed: RANK from 0 to {first[1] - 1}, each once, and one WORLD_SIZE for all"
    store.set(_WRONG, why)
    for absent in range(first[1]):  # so that nobody waits for a rank that cannot come
        store.set(f"here/{absent}", "")
    raise Refused(why)


def check_same(
    store: Store, rank: int, world: int, name: str, facts: Mapping[str, str], timeout_s: float
) -> str:
    """What `facts` differ between ranks, in words, the same on every rank; "" where none do.

    name: of this comparison, of which a job makes each once. Every rank calls this. Raises PolyrankError
    where others do not come within timeout_s. A rank sends a digest; of each digest one rank sends its facts,
    where there are several.
    """

    def wait(keys: list[str]) -> list[str]:
        store.wait([f"{name}/{key}" for key in keys], timedelta(seconds=timeout_s))
        return [store.get(f"{name}/{key}").decode() for key in keys]

    in_order = json.dumps(facts, sort_keys=True)
    store.set(f"{name}/digest/{rank}", hashlib.sha256(in_order.encode()).hexdigest())
    try:
        digests: list[str] = []
        if rank == 0:
            digests = wait([f"digest/{r}" for r in range(world)])
            first = [digests.index(d) for d in dict.fromkeys(digests)]
            store.set(f"{name}/asked", json.dumps(first if len(first) > 1 else []))
        asked: list[int] = json.loads(wait(["asked"])[0])
        if rank in asked:
            store.set(f"{name}/facts/{rank}", json.dumps(facts))
        if rank == 0 and asked:
            answers = zip(asked, wait([f"facts/{r}" for r in asked]), strict=True)
            by_digest = {digests[r]: json.loads(theirs) for r, theirs in answers}
            store.set(f"{name}/words", _differing([by_digest[d] for d in digests]))
        return wait(["words"])[0] if asked else ""
    except RuntimeError as error:
        raise PolyrankError(
            f"rank {rank} has waited {timeout_s:g} s (run.timeout_s) for the others to compare their {name}"
        ) from error


def _differing(facts: Sequence[Mapping[str, str]]) -> str:
    """The keys that not all have alike, with the values and who has them."""
    out = []
    for key in dict.fromkeys(key for one in facts for key in one):
        ranks = defaultdict(list)
        for rank, one in enumerate(facts):
            ranks[one.get(key, "not there")].append(rank)
        if len(ranks) > 1:
            values = [f"{said(value)} on {_ranks(who)}" for value, who in ranks.items()]
            more = f" and {len(values) - MOST} other values" if len(values) > MOST else ""
            out.append(f"{key} is {' and '.join(values[:MOST])}{more}")
    more = f"; and {len(out) - MOST} more" if len(out) > MOST else ""
    return "; ".join(out[:MOST]) + more


def _ranks(numbers: Sequence[int]) -> str:
    some = ", ".join(map(str, numbers[:MOST])) + (", .." if len(numbers) > MOST else "")
    return f"rank {some}" if len(numbers) == 1 else f"ranks {some}"
