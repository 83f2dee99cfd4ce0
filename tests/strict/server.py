"""The referee beside the test: a thread that hears all ranks, and says where none of them can go on."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from tests.strict.referee import Broken, Referee, Reply

# How long all hosts must have waited without a word: a rank may have threads that still go on.
GRACE_S = 0.3


class Server:
    """Serves one run of `world` ranks. address: where they call. verdict: why it was cut off, if it was."""

    def __init__(self, world: int, *, eager: bool) -> None:
        self.referee = Referee(world, eager)
        self.verdict: str | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="polyrank-strict-"))
        self.address = str(self._folder / "referee")
        self._listener = Listener(self.address, "AF_UNIX", backlog=world)
        self._lines: dict[Connection, int] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and remove its files."""
        self._closed = True
        with contextlib.suppress(OSError):
            Client(self.address, "AF_UNIX").close()  # the thread may be waiting for ranks
        self._thread.join(10)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        while len(self._lines) < self.referee.world and not self._closed:
            line = self._listener.accept()
            with contextlib.suppress(EOFError):
                self._lines[line] = line.recv()
        while self._lines and not self._closed:
            stuck = self.verdict is None and self.referee.stuck()
            ready = wait(list(self._lines), GRACE_S if stuck else 1.0)
            for line in ready:
                assert isinstance(line, Connection)
                self._hear(line)
            if stuck and not ready:
                self._cut_off(self.referee.verdict())

    def _hear(self, line: Connection) -> None:
        rank = self._lines[line]
        try:
            kind, given = line.recv()
        except (EOFError, OSError):  # it has died
            kind, given = "leave", None
        if kind == "leave":
            del self._lines[line]
            line.close()
            self.referee.leave(rank)
        elif kind == "post":
            try:
                for reply in self.referee.post(rank, given):
                    self._send(reply.rank, reply)
            except Broken as error:
                self._cut_off(str(error))
        elif kind == "wait":
            self.referee.wait(rank, given)
        elif kind == "go on":
            self.referee.go_on(rank, given)
        elif kind == "why":
            self._send(rank, ("why", self.referee.why(rank, given)))

    def _cut_off(self, verdict: str) -> None:
        if self.verdict is None:
            self.verdict = verdict
            for rank in range(self.referee.world):
                self._send(rank, ("over", verdict))

    def _send(self, rank: int, message: Reply | tuple[str, Any]) -> None:
        for line, at in self._lines.items():
            if at == rank:
                with contextlib.suppress(OSError):  # it has ended
                    line.send(message)
