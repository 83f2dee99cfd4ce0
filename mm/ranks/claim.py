"""The claim on a run's folder: one run at a time writes there, from its start to its end.

A claim is a lock on the file run.claim in the folder, and what the file says: who holds it. The lock is the
kernel's, or the file server's. It ends with the processes that have it open, however they end, so a dead run
leaves no claim. Where a file system has no locks, or keeps those of each machine to itself, what the file
says counts: a holder of this machine is looked up, and one of another machine must touch the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.errors import Refused
from mm.faults.stacks import this_machine

CLAIM = "run.claim"
TOUCH_S = 3.0  # between two touches of a holder
QUIET_S = 15.0  # a holder on another machine that has not touched its claim for so long is dead
ENDING_S = 10.0  # that processes of a dead holder may take to end
SETTLE_S = 1.0  # without locks: after so long, the last of several writers is the holder
POLL_S = 0.2


@dataclass(frozen=True)
class Holder:
    """Who claims: a process of a machine. launch: of the run, "" where it has no name yet."""

    host: str
    machine: str  # this start of the machine, with the set of process ids that it counts in
    pid: int
    began: str  # when the process did, as the kernel counts: another process may have its id later
    launch: str

    def gone(self, here: Holder) -> bool:
        """Whether it is a process of this machine that has ended, as `here` can tell."""
        return self.machine == here.machine and _began(self.pid) != self.began

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _began(pid: int) -> str:
    """When a process began, "" where there is none, or it has ended and nobody has asked how."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]
    except OSError:
        return ""


def this_process(launch: str = "") -> Holder:
    """This process as a holder."""
    return Holder(socket.gethostname(), this_machine(), os.getpid(), _began(os.getpid()), launch)


@contextlib.contextmanager
def claimed(
    folders: Sequence[Path], launch: str = "", say: Callable[[str], object] = lambda line: None
) -> Iterator[tuple[int, ...]]:
    """Hold claims on folders, which are made where they are missing; gives the files that hold them.

    launch: a name that this run had before it was started again; claims of that name are its own. say: gets a
    line where another machine's claim has to be watched for a while. Raises Refused where another run has one
    of the folders, or one cannot be written.
    """
    held: list[tuple[Path, int]] = []
    stopped = threading.Event()
    touching = threading.Thread(target=_touch, args=(held, stopped), daemon=True)
    try:
        for folder in dict.fromkeys(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.append((folder / CLAIM, _claim(folder / CLAIM, this_process(launch), say)))
            except OSError as error:
                raise Refused(
                    f"run.dir {folder} cannot be written: {error.strerror}; needed: a folder that can"
                ) from error
        touching.start()
        yield tuple(fd for _, fd in held)
    finally:
        stopped.set()
        for path, fd in held:
            _release(path, fd)


def _touch(held: Sequence[tuple[Path, int]], stopped: threading.Event) -> None:
    while not stopped.wait(TOUCH_S):
        for _, fd in held:
            with contextlib.suppress(OSError):  # a folder that is read-only now, or gone
                os.utime(fd)


def _release(path: Path, fd: int) -> None:
    """Give a claim up. The file goes first: who opens it now finds a new one."""
    with contextlib.suppress(OSError):
        if _is_at(path, fd):
            path.unlink()
    os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _claim(path: Path, here: Holder, say: Callable[[str], object]) -> int:
    """The open file of a claim. Raises Refused where another run has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            locked = _lock(path, fd, here)
            if not _is_at(path, fd):  # its holder has removed it meanwhile
                os.close(fd)
                continue
            other = _read(fd)
            if other is not None and _lives(other, path, here, locked, say):
                raise _taken(path, other)
            _write(fd, here)
            if not locked:
                time.sleep(SETTLE_S)
                now = _read(fd)
                if now != here or not _is_at(path, fd):
                    raise _taken(path, now)
            return fd
        except BaseException:
            os.close(fd)
            raise


def _lock(path: Path, fd: int, here: Holder) -> bool:
    """Take the lock of a file; False where the file system has none. Raises Refused where it is taken."""
    until = time.monotonic() + ENDING_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
        other = _read(fd)
        # Processes that the holder has started may have the file open a little longer.
        if other is None or not other.gone(here) or time.monotonic() > until:
            raise _taken(path, other)
        time.sleep(POLL_S)


def _lives(other: Holder, path: Path, here: Holder, locked: bool, say: Callable[[str], object]) -> bool:
    """Whether the run that a claim names goes on. locked: this process has the lock of the claim."""
    if here.launch and other.launch == here.launch:
        return False  # this run's own, of ranks that were started before
    if other.machine.partition(" ")[0] == here.machine.partition(" ")[0] and locked:
        return False  # one kernel keeps its locks exactly
    if other.machine == here.machine:
        return not other.gone(here)
    say(f"{path} is held by {other}; looking for {QUIET_S:g} s whether that run goes on")
    seen, until = _touched(path), time.monotonic() + QUIET_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        now = _touched(path)
        if now is None:
            return False  # it was given up
        if now != seen:
            return True
    return False


def _touched(path: Path) -> int | None:
    """When a file was touched, None where it is gone. It is opened: file servers then give what is so now."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _read(fd: int) -> Holder | None:
    """What a claim says; None where it says nothing that can be read: its writer died there."""
    try:
        said: Mapping[str, Any] = json.loads(os.pread(fd, 4096, 0))
        text = {k: str(said[k]) for k in ("host", "machine", "began", "launch")}
        return Holder(pid=int(said["pid"]), **text)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(fd: int, here: Holder) -> None:
    text = json.dumps(here.__dict__).encode()
    os.ftruncate(fd, 0)
    os.pwrite(fd, text, 0)
    os.fsync(fd)


def _taken(path: Path, holder: Holder | None) -> Refused:
    who = "" if holder is None else f" ({holder})"
    return Refused(
        f"another run is writing to run.dir {path.parent}{who}; needed: a folder of its own, or the end of "
        "that run"
    )
