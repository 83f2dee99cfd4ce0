"""Starting ranks: this machine's by ourselves, or joining those that torchrun started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mm.errors import PolyrankError, Refused
from mm.ranks.stop import Requests, Stop, hear_requests, hold_requests, on_request

if TYPE_CHECKING:
    import torch
    from torch.distributed import PrefixStore, Store

    from mm.config.schema import Config

# Let glibc keep freed memory between steps: giving it back costs a page fault for each page used again.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
GRACE_S = 15.0  # for the others to end by themselves once a rank has failed
TELL_S = 5.0  # between words about what is waited for
LOCALHOST = "127.0.0.1"
LAUNCHER = "POLYRANK_LAUNCHER"  # from launch_local to its ranks: its process id


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the job, its device, and the job's store for words about who is where.

    node_size: ranks a machine, None where one machine has all. timeout_s: bounds every wait. launch: a name
    of this launch, for rank 0, the same when torchrun starts the ranks again; again: an earlier start of them
    left it.
    """

    rank: int
    world: int
    device: torch.device
    store: Store | None = None
    node_size: int | None = None
    timeout_s: float = 120.0
    launch: str = ""
    again: bool = False


def launched() -> bool:
    """Whether torchrun (or launch_local) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarted() -> bool:
    """Whether torchrun says that it has started these ranks before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def world_size() -> int:
    """Ranks of the job that this process was started for."""
    return int(os.environ["WORLD_SIZE"])


def launch_local(
    nproc: int, argv: Sequence[str], check: Callable[[], object] = lambda: None, stop: Stop | None = None
) -> int:
    """Run `python -m mm ARGV` as nproc ranks on this machine; returns the exit code of the job.

    check: what is left to check of the job, done while the ranks import torch; they end where it raises.
    When a rank fails the others get a moment to end by themselves, then are stopped. The code is that of a
    failing rank with a known meaning (2 to 5), else 1. SIGINT and SIGTERM reach the ranks as SIGTERM; after a
    second request they have GRACE_S to end. Where `stop` was asked already, none is started.
    """
    # We host the store of the rendezvous, as torchrun does: no race for a port, and it outlives every rank.
    # Its port is open before the store is: ranks that come early wait, and all import torch at one time.
    listener = socket.create_server((LOCALHOST, 0), backlog=nproc)
    common = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(listener.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with on_request(lambda: _ask_to_end(ranks)) as requests:
        if stop is not None and stop.asked:
            print("stopped by a signal before the first step", flush=True)
            return 0
        try:
            for r in range(nproc):
                ranks.append(_start(argv, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}))
            with _telling("importing torch"):
                check()
                store = _host(listener)
            if requests.count:  # while they were started: not all of them have heard of it
                _ask_to_end(ranks)
            codes = _wait(ranks, requests)
            del store  # it had to outlive them
        finally:
            listener.close()
            for p in ranks:
                p.kill()
    if not requests.count:
        _tell_of_signals(codes)
    elif -signal.SIGTERM in codes.values() or not codes:
        print("interrupted", file=sys.stderr, flush=True)  # before a rank could say so
    known = [c for c in codes.values() if c in (2, 3, 4, 5)]
    if known:
        return known[0]
    return 1 if any(codes.values()) or len(codes) < nproc else 0


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Say every TELL_S seconds what is still being done."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(TELL_S):
            print(f"{what}, {time.monotonic() - start:.0f} s", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _host(listener: socket.socket) -> Store:
    """The store of the rendezvous on a port that is open already."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(
        LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _ask_to_end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    # Always SIGTERM: of SIGINT, a rank that is still importing makes a traceback.
    for p in ranks:
        with contextlib.suppress(ProcessLookupError):
            p.send_signal(signal.SIGTERM)


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # One thread a rank: ranks share the cores, and threads of their own would fight over them.
    with hold_requests():  # until the rank can end well
        return subprocess.Popen(
            [sys.executable, "-m", "mm", *argv],
            env={**ALLOCATOR, **os.environ, "OMP_NUM_THREADS": "1", **env},
            start_new_session=True,  # a Ctrl-C reaches the ranks once, through us
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], requests: Requests) -> dict[int, int]:
    """Exit codes by rank, in the order of ending; a rank that had to be stopped has none."""
    codes: dict[int, int] = {}
    deadline: float | None = None
    while len(codes) < len(ranks):
        for r, p in enumerate(ranks):
            if r not in codes and p.poll() is not None:
                codes[r] = p.returncode
        if deadline is None and (any(codes.values()) or requests.count > 1):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return codes


def _tell_of_signals(codes: Mapping[int, int]) -> None:
    """A rank that a signal ended could not say anything itself."""
    for r, code in codes.items():
        if code < 0:
            print(f"rank {r} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)


def follow_launcher() -> None:
    """Hear of requests to end from here on, which launch_local has held back while this rank was started.

    Have the kernel send it SIGTERM should launch_local be killed: no rank is left behind.
    """
    if LAUNCHER not in os.environ:
        return
    hear_requests()
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.environ[LAUNCHER] != str(os.getppid()):  # it was killed before we asked
        raise KeyboardInterrupt


def speaks(error: BaseException) -> bool:
    """Whether this process reports `error`: of all the ranks of a job one does, which knows the reason.

    A failing rank breaks the others' communication. Those errors wait, so that the reason is told first.
    """
    if not launched():
        return True
    time.sleep(_patience(error))
    try:
        return _store(5.0).add("failures", 1) == 1
    except Exception:  # no store to ask, whatever the reason; a known one may be that very thing
        return isinstance(error, PolyrankError) or os.environ["RANK"] == "0"


def _store(timeout_s: float, *, hosts: bool = False) -> PrefixStore:
    """The store of the rendezvous, for words of this job's; hosts: this process is to run it."""
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=hosts,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # A restarted job must not read the words of the one before.
    return PrefixStore(f"polyrank/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _patience(error: BaseException) -> float:
    """Seconds: none for a known reason, some for an unknown one, more where communication broke."""
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
    """Join the job's default process group. Its waits are bounded by run.timeout_s."""
    import torch
    import torch.distributed as dist

    # Newer torch renames the tensor collectives; the old names are the ones that torch 2.11 has.
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
    words = _meet(rank, world, cfg.run.timeout_s)
    # The backend follows from the device; torch knows which one serves it.
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=dist.PrefixStore("group", words),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=cfg.run.timeout_s),
    )
    name, again = _name_launch(words) if rank == 0 else ("", False)
    node_size = local_ranks if local_ranks < world else None
    return RankInfo(rank, world, device, words, node_size, cfg.run.timeout_s, name, again)


def _name_launch(words: PrefixStore) -> tuple[str, bool]:
    """A name of this launch, and whether an earlier start of its ranks has made it."""
    own = uuid.uuid4().hex
    # Beside the words of each start: torchrun's store outlives the ranks that it starts again.
    name = words.underlying_store.compare_set("polyrank/launch", "", own).decode()
    return name, name != own


def _meet(rank: int, world: int, timeout_s: float) -> PrefixStore:
    """The job's store, once every rank has come to it. Raises PolyrankError naming those that have not."""
    # torchrun and launch_local host it; ranks that were started otherwise have rank 0 do so.
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    try:
        words = _store(timeout_s, hosts=hosts)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PolyrankError(
            f"rank {rank} does not reach the job's store at {where} within {timeout_s:g} s; rank 0 or "
            f"torchrun must run there, and the port be free ({str(error).splitlines()[0]})"
        ) from error
    keys = [f"here/{r}" for r in range(world)]
    words.set(keys[rank], "")
    start = time.monotonic()
    while True:
        left = max(0.001, start + timeout_s - time.monotonic())
        try:
            words.wait(keys, timedelta(seconds=min(left, TELL_S) if rank == 0 else left))
        except RuntimeError as error:
            absent = [r for r, key in enumerate(keys) if not words.check([key])]
            some = ", ".join(map(str, absent[:8])) + (", .." if len(absent) > 8 else "")
            if rank == 0 and time.monotonic() < start + timeout_s:
                print(f"{world - len(absent)} of {world} ranks have started, not yet: {some}", flush=True)
                continue
            raise PolyrankError(
                f"{len(absent)} of {world} ranks have not come within {timeout_s:g} s (run.timeout_s): "
                f"{some}; start all of them, with one rendezvous, or wait longer"
            ) from error
        if rank == 0 and world > 1:
            print(f"all {world} ranks have started", flush=True)
        return words
