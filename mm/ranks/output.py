"""Standard output and error that may go away while a run goes on: a terminal that is closed, a full disk."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Lasting(io.RawIOBase):
    """A file to which writing never fails: what cannot be written is dropped, from then on without a try."""

    def __init__(self, fd: int) -> None:
        self._fd, self._gone = fd, False

    def write(self, data: Any, /) -> int | None:
        if self._gone:
            return len(data)
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return None
        except OSError:
            self._gone = True
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)


def lasting(stream: TextIO) -> TextIO:
    """A text stream to the same file, to which writing never fails."""
    stream.flush()
    raw = io.BufferedWriter(_Lasting(stream.fileno()))
    whole_lines = stream.isatty() or stream is sys.stderr
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=whole_lines)
