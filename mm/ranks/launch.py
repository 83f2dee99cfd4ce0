"""Start the ranks of this machine, or join as a rank that torchrun or launch_local has started.

The launcher calls launch_local(). A rank calls follow_launcher(), then come() and join(), or both in one as
init_distributed().
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from mm.config.nodes import node_size
from mm.errors import PolyrankError, Refused
from mm.faults import failure
from mm.faults.blame import Post
from mm.faults.failure import Failure
from mm.faults.record import FlightRecord
from mm.faults.watch import post_key
from mm.ranks.rendezvous import PROGRESS_S, check_same, connect, meet, name_launch, of_start
from mm.ranks.stop import Requests, Stop, block_requests, on_request, unblock_requests

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

    from mm.config.schema import Config

# glibc keeps freed memory between steps: a page returned to the kernel costs a page fault when used again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
GRACE_S = 8.0  # seconds that the other ranks have to end by themselves once a rank has failed
LOCALHOST = "127.0.0.1"
LAUNCHER = "POLYRANK_LAUNCHER"  # environment variable with launch_local's process id, set for its ranks
CLAIMS = "POLYRANK_CLAIMS"  # another, with the files that its ranks keep open


@dataclass(frozen=True)
class RankInfo:
    """This process as a rank of the job."""

    rank: int
    world: int  # ranks of the job
    device: torch.device
    store: Store | None = None  # the job's key-value store, None where a test needs none
    node_size: int | None = None  # ranks a node, None where one node has all of them
    timeout_s: float = 120.0  # longest wait for another rank, seconds
    launch: str = ""  # on rank 0 a name of this launch, the same when torchrun starts the ranks again
    relaunched: bool = False  # on rank 0: an earlier start of these ranks has made the name
    agent: int = 0  # torchrun's process that started this one, 0 where another has
    record: FlightRecord = field(default_factory=FlightRecord, compare=False, repr=False)  # what it does


def launched() -> bool:
    """Whether torchrun (or launch_local) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def held_by_launcher() -> bool:
    """Whether launch_local started this process as a rank: it holds the claims on the run's folders."""
    return LAUNCHER in os.environ


def restarted() -> bool:
    """Whether torchrun has started these ranks before, by its own count."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def world_size() -> int:
    """Ranks of the job that this process was started for."""
    return int(os.environ["WORLD_SIZE"])


def launch_local(
    nproc: int,
    argv: Sequence[str],
    check: Callable[[], object] = lambda: None,
    stop: Stop | None = None,
    claims: Sequence[int] = (),
) -> int:
    """Run `python -m mm ARGV` as nproc ranks on this machine; returns the exit code of the job.

    check: checks the rest of the job while the ranks import torch; where it raises, the ranks are ended.
    stop: where an end was requested already, no rank is started. claims: open files (mm.ranks.claim) that
    every rank keeps open too, so that they outlive this process where the ranks do.

    When a rank fails, the others have GRACE_S to end by themselves; then they are killed. The exit code is
    that of the failure that ranks have named, else that of a failing rank if it has a known meaning (2 to 5),
    else 1. SIGINT, SIGTERM and SIGHUP reach the ranks as SIGTERM; after a second request they have GRACE_S
    to end.
    """
    # The launcher hosts the store of the rendezvous, as torchrun does: the store outlives every rank, and
    # nobody races for its port. The port is open before the store serves it: ranks that come early wait, and
    # all processes import torch at the same time.
    listener = socket.create_server((LOCALHOST, 0), backlog=nproc)
    common = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(listener.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **_own_interface(),
        LAUNCHER: str(os.getpid()),
        CLAIMS: " ".join(map(str, claims)),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with on_request(lambda: _terminate(ranks)) as requests:
        if stop is not None and stop.requested:
            print("stopped by a signal before the first step", flush=True)
            return 0
        try:
            for r in range(nproc):
                ranks.append(_start(argv, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}))
            with _progress("importing torch"):
                check()
                store = _host(listener)
            if requests.count:  # it came while ranks were being started, and has not reached all of them
                _terminate(ranks)
            codes = _wait(ranks, requests, partial(_tell, store))
            failed = _failed(store)
            del store  # kept until here: it must outlive the ranks
        finally:
            listener.close()
            for p in ranks:
                p.kill()
    if requests.count and (-signal.SIGTERM in codes.values() or not codes):
        print("interrupted", file=sys.stderr, flush=True)  # no rank was able to report it
    return exit_code(codes, nproc, failed)


def exit_code(codes: Mapping[int, int], nproc: int, failed: Failure | None) -> int:
    """The code of a job. codes: by rank that has ended, in that order, its own. failed: why the job has.

    A rank that ends without a word, by the hand of a plug-in, may have any code: the job's is that of the
    failure.
    """
    if failed is not None and any(codes.values()):
        return failed.code
    known = [c for c in codes.values() if c in (2, 3, 4, 5)]
    if known:
        return known[0]
    return 1 if any(codes.values()) or len(codes) < nproc else 0


def _failed(store: Store) -> Failure | None:
    theirs = of_start(store)
    return failure.read(theirs.get(failure.KEY)) if theirs.check([failure.KEY]) else None


def _own_interface() -> dict[str, str]:
    """Environment with which gloo listens where this machine alone can connect.

    By itself it takes the address of the host's name, which others may reach. What the user has set stays.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", names[0])} if names else {}


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Print every PROGRESS_S seconds that `what` goes on inside."""
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(PROGRESS_S):
            print(f"{what}, {time.monotonic() - start:.0f} s", flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _host(listener: socket.socket) -> Store:
    """The store of the rendezvous, served on a listener that is open already."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

    port = listener.getsockname()[1]
    return TCPStore(
        LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _terminate(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    # Always SIGTERM: a rank that is still importing would answer SIGINT with a traceback.
    for p in ranks:
        with contextlib.suppress(ProcessLookupError):
            p.send_signal(signal.SIGTERM)


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # One thread a rank: the ranks share the cores, and more threads would compete for them.
    with block_requests():  # until the rank unblocks them
        return subprocess.Popen(
            [sys.executable, "-m", "mm", *argv],
            env={**ALLOCATOR, **os.environ, "OMP_NUM_THREADS": "1", **env},
            pass_fds=[int(fd) for fd in env.get(CLAIMS, "").split()],
            start_new_session=True,  # a Ctrl-C reaches the ranks once, through the launcher
        )


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], requests: Requests, tell: Callable[[int, int], object]
) -> dict[int, int]:
    """Exit codes by rank, in the order of ending; a rank that has not ended in time has none.

    tell: called with the first rank that a signal has ended, which could not tell it itself, and the signal.
    """
    codes: dict[int, int] = {}
    deadline: float | None = None
    while len(codes) < len(ranks):
        for r, p in enumerate(ranks):
            if r not in codes and p.poll() is not None:
                if p.returncode < 0 and not any(codes.values()) and not requests.count:
                    tell(r, -p.returncode)
                codes[r] = p.returncode
        if deadline is None and (any(codes.values()) or requests.count > 1):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return codes


def _tell(store: Store, rank: int, number: int) -> None:
    """Tell the user, and the other ranks, that a signal has ended a rank."""
    text = f"rank {rank} was ended by {signal.Signals(number).name}"
    theirs = of_start(store)
    if theirs.check([post_key(rank)]) and theirs.check([failure.KEY]):  # its heartbeat went
        post = Post.parse(theirs.get(post_key(rank)).decode())
        text += f", last seen in {post.at}" if post is not None else ""
        own = Failure(text, rank, 1, failure.LAUNCHER)
        if failure.tell(theirs, own) != own:  # the others ended it, or have seen it first
            return
    print(text, file=sys.stderr, flush=True)


def follow_launcher() -> None:
    """Receive signals from here on: launch_local has blocked them while this rank was started.

    Should launch_local be killed, the kernel sends this rank SIGTERM, so that no rank is left behind. Does
    nothing in a process that launch_local has not started.
    """
    if not held_by_launcher():
        return
    unblock_requests()
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.environ[LAUNCHER] != str(os.getppid()):  # it was killed before prctl
        raise KeyboardInterrupt


def reports(error: BaseException) -> bool:
    """Whether this process reports `error`: one rank of a job does, the one that knows the reason.

    A failing rank breaks the others' communication. Their errors wait here, so that the reason comes first.
    """
    if not launched():
        return True
    time.sleep(patience(error))
    try:
        return connect(5.0).add("failures", 1) == 1
    except Exception:  # the store is not reached, for any reason; a known `error` may be just that
        return isinstance(error, PolyrankError) or os.environ["RANK"] == "0"


def patience(error: BaseException) -> float:
    """Seconds to wait before `error` is reported: 0 for a known reason, more for an unknown one, most where
    communication broke."""
    if isinstance(error, PolyrankError | KeyboardInterrupt):
        return 0.0
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    in_torch = at is not None and "torch/distributed" in at.tb_frame.f_code.co_filename.replace(os.sep, "/")
    return 2.0 if in_torch else 0.5


def choose_device(wanted: str, local_rank: int, local_ranks: int, cuda_devices: int) -> str:
    """The device of a rank: "cpu" or "cuda:K", one CUDA device a rank.

    wanted is run.device. Raises Refused where it is cuda and this machine has too few devices.
    """
    if wanted == "cuda" and cuda_devices < local_ranks:
        works = f"--nproc {cuda_devices} or run.device=cpu" if cuda_devices else "run.device=cpu"
        raise Refused(
            f"run.device=cuda with {local_ranks} ranks on this machine needs {local_ranks} CUDA devices, "
            f"found {cuda_devices}; nearest: {works}"
        )
    if wanted == "cpu" or cuda_devices < local_ranks:
        return "cpu"
    return f"cuda:{local_rank}"


def init_distributed(cfg: Config) -> RankInfo:
    """Meet the other ranks, and make the job's default process group. Waits are bounded by run.timeout_s."""
    return join(come(cfg), cfg)


def come(cfg: Config) -> RankInfo:
    """Meet the other ranks at the job's store, on the device of this one."""
    import torch

    # Newer torch renames the tensor collectives; torch 2.11 has only the old names.
    warnings.filterwarnings("ignore", r"`torch.distributed.*` is deprecated", FutureWarning)
    rank, world = int(os.environ["RANK"]), world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    count = torch.cuda.device_count()
    device = torch.device(choose_device(cfg.run.device, local_rank, local_ranks, count))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        if rank == 0 and cfg.run.device == "auto" and count:
            print(
                f"run.device=auto: {local_ranks} ranks but {count} CUDA devices, so the CPU is used; "
                f"for CUDA start at most {count} ranks (--nproc {count})",
                file=sys.stderr,
            )
    store = meet(rank, world, cfg.run.timeout_s)
    return RankInfo(
        rank,
        world,
        device,
        store=store,
        node_size=node_size(cfg, world),
        timeout_s=cfg.run.timeout_s,
        agent=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ and not held_by_launcher() else 0,
    )


def join(here: RankInfo, cfg: Config, facts: Mapping[str, str] | None = None) -> RankInfo:
    """Make the default process group of the ranks that have met.

    facts: what all ranks must have alike. Raises Refused where they do not.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, not in __all__

    rank, world, device, store = here.rank, here.world, here.device, here.store
    assert isinstance(store, PrefixStore), "ranks have come to it"
    if facts is not None:
        facts = {**facts, "device": device.type}
        if wrong := check_same(store, rank, world, "start", facts, cfg.run.timeout_s):
            raise Refused(
                f"ranks do not agree at the start: {wrong}; needed: one config, one code, the same packages"
            )
    # The backend follows from the device: torch knows which one serves it.
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=cfg.run.timeout_s),
        # Bound, groups connect when they are made; unbound, at a first use that nobody has ordered.
        device_id=device if device.type == "cuda" else None,
    )
    name, relaunched = name_launch(store) if rank == 0 else ("", False)
    return replace(here, launch=name, relaunched=relaunched)
