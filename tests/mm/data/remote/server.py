"""Servers for tests: files by HTTP with ranges, and a packaged S3 server behind a proxy, both with faults."""

from __future__ import annotations

import http.client
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import pytest

Answer = tuple[int, dict[str, str], bytes]
Answers = Callable[[str, str, Mapping[str, str], bytes], Answer]  # of (method, path, headers, body)


@dataclass
class Server:
    """A server in a thread. faults: of the next requests that ask for a range, in order: "500", "503", "403"
    (answered), "reset" and "short" (the connection ends before and in the answer), "stall", "" (none),
    "wrong" (a bit of the answer is another). writes: likewise of the next ones that write or remove; "lost"
    is one that is carried out and whose answer does not come."""

    answers: Answers
    faults: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    url: str = ""
    delay_s: float = 0.0  # before each answer with a range
    stall_s: float = 1.5
    lock: Lock = field(default_factory=Lock)

    def ranges(self) -> list[str]:
        """The ranges that were asked for, in order."""
        return [headers["range"] for _, _, headers in self.asked if "range" in headers]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Threads

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        state = self.server.state
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        with state.lock:
            state.asked.append((self.command, self.path, headers))
            faults = state.faults if "range" in headers else []
            if self.command in ("PUT", "POST", "DELETE"):
                faults = state.writes
            fault = faults.pop(0) if faults else ""
        if "range" in headers:
            time.sleep(state.delay_s)
        if fault == "stall":
            time.sleep(state.stall_s)
        if fault == "reset":
            self._reset()
            return
        status, more, data = state.answers(self.command, self.path, headers, body)
        if fault == "lost":
            self._reset()
            return
        if fault == "wrong" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault.isdecimal():
            status, more, data = int(fault), {}, b"<Error><Code>Injected</Code></Error>"
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        if "Content-Length" not in more:
            self.send_header("Content-Length", str(len(data)))
        if self.command != "HEAD":  # in one piece with the headers: TCP delays a second one
            self._headers_buffer += [b"\r\n", data[: len(data) // 2] if fault == "short" else data]
            self.flush_headers()
        else:
            self.end_headers()
        if fault == "short":
            self._reset()

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):  # the connection was reset on purpose
            self.rfile.close()


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    state: Server

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving(answers: Answers, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server on a free port of this machine."""
    threads = _Threads(("127.0.0.1", 0), _Handler)
    scheme = "http" if tls is None else "https"
    threads.state = Server(answers, url=f"{scheme}://127.0.0.1:{threads.server_address[1]}")
    if tls is not None:
        threads.socket = tls.wrap_socket(threads.socket, server_side=True)
    thread = Thread(target=threads.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield threads.state
    finally:
        threads.shutdown()
        threads.server_close()


@cache
def tag_of(data: bytes) -> str:
    """The ETag of a file."""
    return f'"{md5(data).hexdigest()}"'


def files(data: dict[str, bytes], *, ranges: bool = True, etags: bool = True) -> Answers:
    """A web server of files by path, as RFC 9110 has it. ranges, etags: whether it knows them."""

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        found = data.get(path.partition("?")[0])
        if found is None:
            return 404, {}, b""
        tag = tag_of(found)
        more = {"ETag": tag} if etags else {"Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT"}
        if etags and headers.get("if-match", tag) != tag:
            return 412, more, b""
        if not ranges or "range" not in headers:
            return 200, more, found
        first, last = headers["range"].removeprefix("bytes=").split("-")
        part = found[int(first) : int(last) + 1]
        if not part:
            return 416, {**more, "Content-Range": f"bytes */{len(found)}"}, b""
        more["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(found)}"
        return 206, more, part

    return answer


@contextmanager
def s3_server() -> Iterator[Server]:
    """moto's S3 server in a process of its own, behind a proxy that has the faults."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def forward(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        upstream.request(method, path, body or None, dict(headers))
        got = upstream.getresponse()
        data = got.read()
        upstream.close()
        kept = {k: v for k, v in got.getheaders() if k.lower() not in ("connection", "date", "server")}
        return got.status, kept, data

    try:
        end = time.monotonic() + 60
        while True:
            try:
                forward("GET", "/moto-api/", {}, b"")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, "the S3 server has not started"
                time.sleep(0.1)
        with serving(forward) as server:
            yield server
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def s3_for_the_process(secret: str) -> Iterator[Server]:
    """s3_server(), which clients of this process and its children find by the usual variables."""
    set_by_test = pytest.MonkeyPatch()
    with s3_server() as server, set_by_test.context() as env:
        env.setenv("AWS_ENDPOINT_URL", server.url)
        env.setenv("AWS_ACCESS_KEY_ID", "KEY")
        env.setenv("AWS_SECRET_ACCESS_KEY", secret)
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
