"""Output that goes away: what cannot be written ends nothing."""

from __future__ import annotations

import os
import pty
import sys
from pathlib import Path
from typing import TextIO

import pytest

from mm.ranks.output import lasting


def opened(fd: int) -> TextIO:
    return os.fdopen(fd, "w", encoding="utf-8", closefd=False)


def test_what_can_be_written_is() -> None:
    read, write = os.pipe()
    stream = lasting(opened(write))
    print("one", file=stream)
    assert not stream.isatty() and stream.fileno() == write
    print("two \u2192", file=stream, flush=True)
    assert os.read(read, 100).decode() == "one\ntwo \u2192\n"
    os.close(read)
    print("nobody reads", file=stream, flush=True)
    print("nor this", file=stream, flush=True)
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError):
        os.write(fd, b"x")
    print("lost", file=lasting(opened(fd)), flush=True)
    os.close(fd)


@pytest.mark.skipif(sys.platform != "linux", reason="terminals close otherwise elsewhere")
def test_a_terminal_that_is_closed() -> None:
    ours, theirs = pty.openpty()
    stream = lasting(opened(theirs))
    print("here", file=stream)  # a line is written at once
    assert stream.isatty() and os.read(ours, 100) == b"here\r\n"
    os.close(ours)
    with pytest.raises(OSError):
        os.write(theirs, b"x")
    for _ in range(2):
        print("gone", file=stream, flush=True)
    os.close(theirs)
