"""Errors that pass are tried again a bounded number of times; others are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mm.data.remote.retry import Changed, Limits, Short, Unreachable, persist, transient
from mm.errors import DataError

LIMITS = Limits(timeout_s=5, attempts=3, pause_s=0.001)
URL = "https://user:SECRET@host/shard.tar?sig=SECRET"


def with_status(status: int, **more: object) -> Exception:
    error = Exception(f"{status}, url='{URL}'")
    error.__dict__.update(status=status, **more)
    return error


class ClientPayloadError(Exception):
    """Named as aiohttp's."""


BOTO = OSError(5, "we encountered an internal error")
BOTO.__cause__ = Exception("ClientError")
BOTO.__cause__.__dict__["response"] = {"ResponseMetadata": {"HTTPStatusCode": 503}}
HTTPX = Exception("too many requests")
HTTPX.__dict__["response"] = SimpleNamespace(status_code=429)


@pytest.mark.parametrize(
    "error",
    [
        *(
            TimeoutError(),
            ConnectionResetError(),
            Short("1 of 2 bytes came"),
            ClientPayloadError(),
            BOTO,
            HTTPX,
        ),
        *(with_status(500), with_status(503), with_status(429), with_status(408)),
    ],
    ids=repr,
)
def test_errors_that_pass(error: Exception) -> None:
    assert transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError(), PermissionError(), Changed(), ValueError(), DataError("no ranges")),
        *(with_status(403), with_status(404), with_status(412), with_status(501), KeyError("size")),
    ],
    ids=repr,
)
def test_errors_that_stay(error: Exception) -> None:
    assert not transient(error)


def run(errors: list[Exception], said: list[str]) -> str:
    async def attempt() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    return asyncio.run(persist("bytes 0-5 of s3://b/k", attempt, LIMITS, said.append))


def test_the_last_attempt_counts_and_each_further_one_is_told() -> None:
    said: list[str] = []
    assert run([with_status(500), ConnectionResetError("reset")], said) == "done"
    assert [line.partition(" in ")[0] for line in said] == [
        "bytes 0-5 of s3://b/k: Exception (HTTP 500): 500, url='https://host/shard.tar'; attempt 2 of 3",
        "bytes 0-5 of s3://b/k: ConnectionResetError: reset; attempt 3 of 3",
    ]


def test_a_store_that_does_not_answer_ends_the_run() -> None:
    said: list[str] = []
    with pytest.raises(Unreachable, match=r"bytes 0-5 of s3://b/k: .*HTTP 503.*; 3 attempts have failed"):
        run([with_status(503)] * 4, said)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (with_status(404), FileNotFoundError, "there is no such object"),
        (with_status(403), PermissionError, "access is denied"),
        (with_status(412), Changed, "it has changed since it was indexed"),
        (ValueError(URL), OSError, "ValueError: https://host/shard.tar"),
        (DataError(URL), DataError, "https://host/shard.tar"),
    ],
)
def test_what_stays_is_told_once_with_the_name_and_no_secret(
    error: Exception, kind: type[Exception], words: str
) -> None:
    said: list[str] = []
    with pytest.raises(kind, match="s3://b/k") as raised:
        run([error], said)
    assert words in str(raised.value) and not said
    assert "SECRET" not in str(raised.value) and raised.value.__suppress_context__


def test_a_wait_has_an_end() -> None:
    async def never() -> None:
        await asyncio.sleep(60)

    wait: Callable[[], object] = lambda: asyncio.run(  # noqa: E731
        persist("s3://b/k", never, Limits(timeout_s=0.02, attempts=2, pause_s=0.001), lambda _: None)
    )
    start = time.monotonic()
    with pytest.raises(Unreachable, match=r"s3://b/k: no answer in 0.02 s; 2 attempts"):
        wait()
    assert time.monotonic() - start < 5
