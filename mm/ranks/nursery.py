"""A process that forks a rank's workers, so that none is forked from a rank that runs threads and a device.

It is forked itself before the rank has a thread that reads data, and then only waits: it has one thread, no
device and none of the rank's files. So a worker that is started late, in place of one that has died, begins
as the first ones did. When its rank closes the pipe or has ended, it kills the workers and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from mm.errors import PolyrankError
from mm.forks import fork
from mm.ranks.stop import REQUESTS

Work = Callable[[int, Connection], None]  # of a worker's number and its end of the pipe to the rank
ORDER = struct.Struct("<cq")  # START and a worker's number, or REAP and a pid
ANSWER = struct.Struct("<q")
START, REAP = b"s", b"r"
ANSWER_S = 60.0  # seconds that it may take to answer
GRACE_S = 5.0  # seconds that it has to end


class Nursery:
    """Starts workers of one rank, and says how they have ended.

    work: what a worker does until its pipe ends; it may rely on what is there when the nursery is made. One
    thread of the rank uses a nursery.
    """

    def __init__(self, work: Work, rank: int) -> None:
        self._rank = rank
        self._socket, theirs = socket.socketpair()
        self.pid = fork()
        if self.pid == 0:
            code = 1
            try:
                _serve(theirs, work)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # nothing of the rank's is run or flushed twice
        theirs.close()
        self._socket.settimeout(ANSWER_S)

    def start(self, number: int) -> tuple[int, Connection]:
        """Start a worker: its pid, and the pipe to it."""
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._socket, [ORDER.pack(START, number)], [theirs.fileno()])
        except OSError as error:
            raise self._gone() from error
        finally:
            theirs.close()
        return self._answer(), Connection(ours.detach())

    def reap(self, pid: int) -> int:
        """Kill a worker that has not ended, and return the exit code of one that had, as subprocess does."""
        try:
            self._socket.sendall(ORDER.pack(REAP, pid))
        except OSError as error:
            raise self._gone() from error
        return self._answer()

    def _answer(self) -> int:
        found = b""
        while len(found) < ANSWER.size:
            try:
                more = self._socket.recv(ANSWER.size - len(found))
            except OSError as error:
                raise self._gone() from error
            if not more:
                raise self._gone()
            found += more
        return int(ANSWER.unpack(found)[0])

    def _gone(self) -> PolyrankError:
        return PolyrankError(f"the process that starts the workers of rank {self._rank} has ended or hangs")

    def close(self) -> None:
        """End all workers and the process, and wait for it."""
        self._socket.close()
        deadline = time.monotonic() + GRACE_S
        while self.pid and os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        self.pid = 0


def _serve(orders: socket.socket, work: Work) -> None:
    # A request to stop goes to the rank, which ends its processes when it is done.
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    # Other ranks notice the end of this one by its connections, which a copy here would keep open.
    _close_all_but(orders.fileno())
    torch.set_num_threads(1)  # its threads did not come along, and workers are many
    # The tokenizers package has threads too, and warns of a fork after it has used them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    living: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(orders, ORDER.size, 1, socket.MSG_WAITALL)
        if not data:
            break
        what, number = ORDER.unpack(data)
        if what == REAP:
            answer = _reaped(number)
            living.discard(number)
        else:
            answer = fork()
            if answer == 0:
                orders.close()
                work(number, Connection(fds[0]))
                return
            os.close(fds[0])
            living.add(answer)
        orders.sendall(ANSWER.pack(answer))
    for pid in living:
        _reaped(pid)


def _reaped(pid: int) -> int:
    # One that ended by itself keeps its status: a signal does not change it.
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _close_all_but(kept: int) -> None:
    """Close all files but the standard streams and `kept`."""
    for fd in map(int, os.listdir("/dev/fd")):
        if fd > 2 and fd != kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)
