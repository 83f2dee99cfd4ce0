"""Stacks of all threads of a rank, the stuck one's too: written by C code, whoever holds the interpreter."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

SIGNAL = signal.SIGUSR2  # asks a process for its stacks
WAIT_S = 1.5  # for the stacks of a process that was asked, and for its end


class Stacks:
    """Open while a rank trains: stacks go to a file without a name, which ends with the process.

    exit_s: a process whose timer is not set again for so long writes its stacks to stderr. ends: and ends
    itself.
    """

    def __init__(self, exit_s: float, *, ends: bool) -> None:
        self._exit_s, self._ends = exit_s, ends
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open while the rank trains
        faulthandler.register(SIGNAL, file=self._file, all_threads=True)

    @property
    def number(self) -> int:
        """The file's descriptor, by which processes of the same user may read it (Linux)."""
        return self._file.fileno()

    def set_timer(self) -> None:
        """Begin anew to count the seconds to the end. A thread that needs no interpreter counts them."""
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._exit_s, exit=self._ends, file=sys.__stderr__)

    def stop_timer(self) -> None:
        """Count no longer."""
        faulthandler.cancel_dump_traceback_later()

    def text(self) -> str:
        """The stacks now."""
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.seek(0)
        return self._file.read().decode(errors="replace")

    def close(self) -> None:
        """Nothing is written from here on."""
        self.stop_timer()
        faulthandler.unregister(SIGNAL)
        self._file.close()


def ask(pid: int, number: int) -> str:
    """The stacks of another process of this machine, which goes on if it was stopped; "" where there are
    none."""
    with contextlib.suppress(OSError):
        os.kill(pid, SIGNAL)
        os.kill(pid, signal.SIGCONT)
        deadline, text = time.monotonic() + WAIT_S, b""
        while time.monotonic() < deadline:
            before, text = text, read(pid, number)
            if text and text == before:
                return text.decode(errors="replace")
            time.sleep(0.1)
    return ""


def read(pid: int, number: int) -> bytes:
    """The file of another process of this machine, by its descriptor there; b"" where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/fd/{number}").read_bytes()
    except OSError:
        return b""


def end(pid: int) -> None:
    """End another process of this machine, which has WAIT_S to end by itself."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and state_of(pid) not in ("", "Z"):
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def this_machine() -> str:
    """This start of the machine, with the set of process ids that this process counts in.

    The name of a host does not tell: containers of several machines may have one name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: a name has to do
        return socket.gethostname()


def state_of(pid: int) -> str:
    """The state of a process of this machine as /proc has it: T stopped, Z ended; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
