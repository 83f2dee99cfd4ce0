"""Jobs under torchrun: an agent and a rank on each of two nodes (nodes.py), forked like those of forge.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests.faults.forge import LIMIT_S, Crowd, Forked, children, fork_rank, metrics
from tests.faults.nodes import Network, Node


class Worker(Forked):
    """A forked rank with what torchrun uses of Popen."""

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def _fork_worker(self: Any, args: Sequence[str], env: Mapping[str, str]) -> Worker:
    at = list(args).index("mm")
    return Worker(fork_rank(list(args)[at + 1 :], env).pid)


def _be_agent(arguments: Sequence[str], said: Path, environ: Mapping[str, str]) -> int:
    for stream, file in ((1, said.with_suffix(".out")), (2, said.with_suffix(".err"))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    os.environ.update(environ)
    SubprocessHandler._popen = _fork_worker  # type: ignore[assignment]  # in this process alone
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        torchrun.main([*arguments])
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        print(f"torchrun: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Agents:
    """torchrun on two nodes. path: the config. options: of torchrun, of both. Files `node-N.out` and `.err`
    have what a node says."""

    def __init__(
        self, path: Path, port: int, options: Sequence[str], cable: Network | None, train: Sequence[str] = ()
    ) -> None:
        self.path, self.folder, self.port = path, path.parent, port
        self.options, self.cable, self.train = options, cable, train
        self.nodes: dict[int, Node] = {}
        self.crowd, self.starts = Crowd(), 0

    def start(self, node: int) -> None:
        """Start a node, or start it again once it was switched off."""
        address = self.cable.address(0) if self.cable else "127.0.0.1"
        # torchrun tells agents apart by address and process id: those of a node that is new are small.
        mine = self.cable.address(node) if self.cable else f"127.0.0.{node + 1}"
        arguments = ["--nproc-per-node=1", f"--local-addr={mine}"]
        if "--rdzv-backend=c10d" in self.options:
            arguments += [f"--rdzv-endpoint={address}:{self.port}", "--rdzv-id=tests"]
            arguments += [f"--rdzv-conf=is_host={1 - node},last_call_timeout=2"]
        else:
            arguments += [f"--node-rank={node}", f"--master-addr={address}", f"--master-port={self.port}"]
        arguments += [*self.options, "-m", "mm", "train", str(self.path), *self.train]
        # Else an agent that was started later would wait for an address that is not told again (torch 2.13).
        unshared = (
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if "--rdzv-backend=c10d" in self.options else {}
        )
        environ = {**unshared, "GLOO_SOCKET_IFNAME": self.cable.interface(node) if self.cable else "lo"}
        said, net = self.folder / f"node-{node}", self.cable.names[node] if self.cable else ""
        self.nodes[node] = Node(
            f"node{node}", lambda: _be_agent(arguments, said, environ), net=net, spent=self.starts
        )
        self.starts += 1

    def stop(self, node: int) -> None:
        """Switch a node off."""
        self.nodes.pop(node).close()

    def said(self, node: int) -> str:
        """What a node has said, errors first."""
        files = [self.folder / f"node-{node}.{name}" for name in ("err", "out")]
        return "\n".join(f.read_text() if f.exists() else "" for f in files)

    def ranks(self, node: int) -> list[int]:
        """The ranks of a node."""
        return children(self.nodes[node].agent())

    def steps(self) -> int:
        """The last step of the metrics."""
        return max(metrics(self.folder), default=0)

    def wait_for(self, what: Callable[[], object], limit_s: float = LIMIT_S) -> bool:
        """Wait until what() holds; False where the agents end before, or it takes too long."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if what():
                return True
            if all(node.code is not None for node in self.nodes.values()):
                return bool(what())
            time.sleep(0.005)
        return False

    def end(self, limit_s: float) -> dict[int, tuple[int | None, float]]:
        """By node, the exit code of its agent and when all its processes had ended; None where some are left
        after limit_s."""
        start = time.monotonic()
        ended: dict[int, float] = {}
        while len(ended) < len(self.nodes) and time.monotonic() < start + limit_s:
            for number, node in self.nodes.items():
                if number not in ended and node.code is not None and not node.processes():
                    ended[number] = time.monotonic() - start
            self.crowd.look()
            time.sleep(0.02)
        return {
            n: (node.code if n in ended else None, ended.get(n, limit_s)) for n, node in self.nodes.items()
        }

    def close(self) -> None:
        """Switch off all nodes."""
        for node in list(self.nodes):
            self.stop(node)


@contextlib.contextmanager
def agents(
    path: Path, port: int, options: Sequence[str], cable: Network | None = None, train: Sequence[str] = ()
) -> Iterator[Agents]:
    """Two nodes with an agent each, started; switched off afterwards."""
    job = Agents(path, port, options, cable, train)
    try:
        for node in range(2):
            job.start(node)
        yield job
    finally:
        job.close()
