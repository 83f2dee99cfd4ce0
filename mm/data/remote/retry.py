"""Requests that fail now and then: which errors pass, how often they are tried again, how long they wait."""

from __future__ import annotations

import asyncio
import errno
import random
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from mm.data.remote.urls import scrub
from mm.errors import DataError

T = TypeVar("T")
CERTIFICATES = (
    "the certificate of who signed it, in a file that SSL_CERT_FILE names, or for s3:// AWS_CA_BUNDLE"
)
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
TRANSIENT = (TimeoutError, ConnectionError, EOFError, asyncio.IncompleteReadError)
BUSY = {errno.EBUSY, errno.EAGAIN, errno.EREMOTEIO, errno.EIO, errno.ETIMEDOUT, errno.ENETUNREACH}
STATUSES = {408, 425, 429}  # of HTTP, below 500, that a later request may not meet
# Errors of client packages, by name: those packages are imported only where a URL needs them.
NAMES = {
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("HTTPClientError", "ResponseStreamingError", "ChecksumError", "FlexibleChecksumError"),  # botocore
    *("TransportError", "ConnectionError", "Timeout", "FSTimeoutError"),  # httpx, requests, fsspec
}


class Unreachable(DataError):
    """A store that does not answer: it ends the run, for the samples themselves may be good."""


class Changed(OSError):
    """An object that is no longer the one that was indexed."""


class Short(ConnectionError):
    """Fewer bytes came than were asked for."""


@dataclass(frozen=True)
class Limits:
    """How long and how often one request is tried."""

    timeout_s: float = 30.0  # of one attempt
    attempts: int = 6
    pause_s: float = 0.2  # before the second attempt; it doubles, times a random share of 0.5 to 1

    @property
    def longest_s(self) -> float:
        """The longest time until a request is given up."""
        return self.attempts * self.timeout_s + self.pause_s * (1 << self.attempts - 1)


def transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: time-outs, lost connections, 408, 425, 429 and 5xx."""
    if _untrusted(error):
        return False
    if isinstance(error, TRANSIENT) or any(kind.__name__ in NAMES for kind in type(error).__mro__):
        return True
    status = _status_in(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in STATUSES
    return not isinstance(error, (Changed, *PERMANENT)) and getattr(error, "errno", None) in BUSY


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, botocore, gcsfs or httpx; None where it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = getattr(error, "status", None) or getattr(response, "status_code", None)
        found = found or getattr(error, "code", None)
    return int(found) if isinstance(found, int) or str(found).isdecimal() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what has caused it."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _status_in(error: BaseException) -> int | None:
    """The HTTP status in an error or in what has caused it."""
    return next((found for at in _causes(error) if (found := status_of(at)) is not None), None)


def _untrusted(error: BaseException) -> bool:
    """Whether a server's certificate is signed by nobody who is known here."""
    return any(isinstance(at, ssl.SSLCertVerificationError) for at in _causes(error))


async def persist(
    what: str, attempt: Callable[[], Awaitable[T]], limits: Limits, warn: Callable[[str], object]
) -> T:
    """The result of `attempt`, tried again with growing pauses while its errors are transient.

    what: the request, with the name of its object, for messages. warn: told of each further attempt. Raises
    Unreachable after the last one, and other errors as an OSError of the same kind that names the object.
    """
    for n in range(1, limits.attempts + 1):
        try:
            return await asyncio.wait_for(attempt(), limits.timeout_s)
        except Exception as error:
            why = _reason(error, limits)
            if not transient(error):
                raise _permanent(what, why, error) from None  # the cause may hold a URL with a password
        if n < limits.attempts:
            pause = limits.pause_s * 2 ** (n - 1) * random.uniform(0.5, 1)
            warn(f"{what}: {why}; attempt {n + 1} of {limits.attempts} in {pause:.1f} s")
            await asyncio.sleep(pause)
    raise Unreachable(f"{what}: {why}; {limits.attempts} attempts have failed")


def _reason(error: BaseException, limits: Limits) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer in {limits.timeout_s:g} s"
    status = _status_in(error)
    said = scrub(" ".join(str(error).split()))[:300]
    return f"{type(error).__name__}{f' (HTTP {status})' if status else ''}{': ' if said else ''}{said}"


def _permanent(what: str, why: str, error: BaseException) -> Exception:
    status = _status_in(error)
    if _untrusted(error):
        return DataError(f"{what}: {why}; needed: {CERTIFICATES}")
    if isinstance(error, DataError):
        return DataError(f"{what}: {scrub(str(error))}")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(f"{what}: there is no such object")
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(f"{what}: access is denied ({why})")
    if isinstance(error, Changed) or status in (409, 412, 416):
        return Changed(f"{what}: it has changed since it was indexed")
    return OSError(f"{what}: {why}")
