"""Machines of their own on this one: a node has its own host name, processes and, if asked, network.

A node is made of Linux namespaces, which need root. Two nodes with networks are joined by one cable, which
can be pulled, or loses all that is sent without a word.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults.forge import children

NEWNS, NEWUTS, NEWPID, NEWNET = 0x20000, 0x4000000, 0x20000000, 0x40000000
PRIVATE, REC = 1 << 18, 16384
NOBODY = "02:00:00:00:00:99"  # no interface has this address: what is sent there is lost


def missing(*, network: bool = False) -> str:
    """Why there can be no nodes here; "" where there can."""
    if not Path("/proc/self/ns/pid").exists() or os.geteuid():
        return "namespaces need Linux and root"
    if network and shutil.which("ip") is None:
        return "networks need the command ip"
    tried = ["unshare", "--pid", "--uts", "--mount", *["--net"] * network, "--fork", "--mount-proc", "true"]
    try:
        done = subprocess.run(tried, capture_output=True, text=True)
    except OSError as error:
        return f"unshare: {error.strerror}"
    return f"unshare: {done.stderr.strip()}" if done.returncode else ""


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


class Network(NamedTuple):
    """Two network namespaces with a cable between them."""

    names: tuple[str, str]

    def address(self, node: int) -> str:
        """The address of a node."""
        return f"10.77.0.{node + 1}"

    def interface(self, node: int) -> str:
        """The name of a node's end of the cable."""
        return f"cable{node}"

    def inside(self, node: int, *words: str) -> None:
        """Run `ip WORDS` on a node."""
        subprocess.run(["ip", "-n", self.names[node], *words], check=True, capture_output=True)

    def pull(self) -> None:
        """Pull the cable: both ends see that it is gone."""
        self.inside(0, "link", "set", self.interface(0), "down")

    def lose(self) -> None:
        """Lose all that is sent from now on; nothing tells either end."""
        for node in range(2):
            at = ("dev", self.interface(node), "nud", "permanent")
            self.inside(node, "neigh", "replace", self.address(1 - node), "lladdr", NOBODY, *at)

    def mend(self) -> None:
        """The cable is as it was."""
        for node in range(2):
            self.inside(node, "link", "set", self.interface(node), "up")
            self.inside(node, "neigh", "flush", "nud", "permanent", "dev", self.interface(node))


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network of two nodes, which is gone afterwards."""
    made = Network((f"polyrank-{os.getpid()}-0", f"polyrank-{os.getpid()}-1"))
    try:
        for name in made.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = [made.interface(0), "netns", made.names[0], "type", "veth"]
        ends += ["peer", "name", made.interface(1), "netns", made.names[1]]
        subprocess.run(["ip", "link", "add", *ends], check=True)
        for node in range(2):
            made.inside(node, "addr", "add", f"{made.address(node)}/24", "dev", made.interface(node))
            for interface in ("lo", made.interface(node)):
                made.inside(node, "link", "set", interface, "up")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Node:
    """A machine that carries out work() and stays until close().

    name: of the host. net: a network namespace, "" for this one. spent: process ids that are spent before
    work() has one. code: of work(), None while it goes on.
    """

    def __init__(self, name: str, work: Callable[[], int], *, net: str = "", spent: int = 0) -> None:
        self._codes, codes = os.pipe()
        self.outer = os.fork()
        if not self.outer:
            try:
                os.close(self._codes)
                _be_node(name, work, net, spent, codes)
            finally:
                os._exit(1)
        os.close(codes)
        os.set_blocking(self._codes, False)
        self.first = self._child_of(self.outer)
        self._agent = self._child_of(self.first, leads=True)
        self._code: int | None = None

    @staticmethod
    def _child_of(pid: int, *, leads: bool = False) -> int:
        """A child of a process, once there is one. leads: a session of its own."""
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            for child in children(pid):
                with contextlib.suppress(OSError):
                    stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    if not leads or stat[3] == str(child):
                        return child
            time.sleep(0.005)
        raise AssertionError("no node")

    @property
    def code(self) -> int | None:
        """How the work ended."""
        if self._code is None:
            with contextlib.suppress(BlockingIOError):
                said = os.read(self._codes, 64)
                self._code = int(said) if said else None
        return self._code

    def processes(self) -> list[int]:
        """All processes of the node but its first, which is ours, as this machine counts them."""
        try:
            own = os.readlink(f"/proc/{self.first}/ns/pid")
        except OSError:
            return []
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != self.first:
                with contextlib.suppress(OSError):
                    state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
                    if os.readlink(f"/proc/{entry}/ns/pid") == own and state != "Z":
                        found.append(int(entry))
        return found

    def agent(self) -> int:
        """The process that carries out the work."""
        return self._agent

    def close(self) -> None:
        """The node is switched off: all that is left of it ends at once."""
        for pid in (self.first, self.outer):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.outer, 0)
        os.close(self._codes)


def _be_node(name: str, work: Callable[[], int], net: str, spent: int, codes: int) -> None:
    if net:
        at = os.open(f"/var/run/netns/{net}", os.O_RDONLY)
        _call("setns", at, NEWNET)
        os.close(at)
    _call("unshare", NEWUTS | NEWPID | NEWNS)
    socket.sethostname(name)
    _call("mount", b"none", b"/", None, REC | PRIVATE, None)
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        os._exit(0)
    _call("mount", b"proc", b"/proc", b"proc", 0, None)
    for _ in range(spent):
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    own = os.fork()
    if not own:
        os.close(codes)
        os.setsid()
        os._exit(work())
    while True:  # the first process takes in those whose parent has ended
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.02)
            continue
        if pid == own:
            os.write(codes, str(os.waitstatus_to_exitcode(status)).encode())
