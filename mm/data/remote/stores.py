"""Stores by scheme: the requests of shards and of copies of checkpoints, through fsspec's file systems.

A range is asked for under the condition that the object is still the one that was indexed, where the store
knows such a condition (S3 and HTTP: If-Match; Google: a generation; Hugging Face: the commit of the URL).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from mm.data.remote.retry import Changed
from mm.data.remote.urls import PACKAGES, public
from mm.errors import DataError

CONNECTIONS = 32  # open at once, to one host
# Of an object, the first of these that its store tells is the version.
EXACT = ("generation", "ETag", "etag", "blob_id")
VERSIONS = (*EXACT, "LastModified", "Last-Modified", "mtime", "created")


@dataclass(frozen=True)
class Stat:
    """What tells an object from a later one of the same name."""

    size: int  # bytes
    version: str  # ETag, generation or blob; where a store has none, the time of its last change


class Store(Protocol):
    """The requests of one scheme. They wait as long as the caller lets them, and do not try again."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that runs the requests, in a thread of fsspec's."""

    async def stat(self, url: str) -> Stat:
        """Size and version of an object; raises FileNotFoundError where there is none."""

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        """Bytes [offset, offset + size) of an object; raises Changed where it has another version now."""

    async def find(self, pattern: str) -> dict[str, Stat | None]:
        """The objects that a glob matches, with their Stat where the listing says it."""

    async def put(self, url: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""

    async def in_parts(self, url: str) -> Parts | None:
        """Begin an object that is written in parts; None where the store cannot."""

    async def put_file(self, url: str, path: Path) -> None:
        """Write an object of a file's content; for stores without parts."""

    async def remove(self, url: str) -> None:
        """Remove an object; it is no error where there is none."""

    async def below(self, url: str) -> dict[str, int]:
        """The objects below a folder, at any depth: bytes by what their URL has after the folder's."""

    async def forget_parts(self, url: str) -> None:
        """Drop the parts of objects below a folder that were begun and never finished."""


class Parts(Protocol):
    """An object that is being written in parts, in any order. It is there once it is finished."""

    async def part(self, number: int, offset: int, data: bytes) -> None:
        """Write a part; numbers begin at 1."""

    async def finish(self) -> None:
        """Join the parts."""

    async def drop(self) -> None:
        """Leave nothing of it."""


def need_package(scheme: str) -> None:
    """Import what a scheme needs; raises DataError with the command where it is missing."""
    package = PACKAGES.get(scheme, "fsspec")
    try:
        for name in ("fsspec", package):
            importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{scheme}:// needs the package {package} ({error}); needed: pip install -e '.[remote]'"
        ) from None


def open_store(scheme: str) -> Store:
    """The store of a scheme; raises DataError where its package is missing."""
    need_package(scheme)
    made: dict[str, Callable[[str], Store]] = {
        "s3": _S3,
        "gs": _Google,
        "http": _Http,
        "https": _Http,
        "hf": _HuggingFace,
        "file": _File,
    }
    return made.get(scheme, _Any)(scheme)


class _Any:
    """A file system of fsspec as it is: no condition on the version."""

    def __init__(self, scheme: str, kind: Callable[..., Any] | None = None, **options: Any) -> None:
        import fsspec
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        self.scheme = scheme
        # Listings are kept for a process's life by default: a changed object would not be noticed.
        fs = (kind or fsspec.get_filesystem_class(scheme))(use_listings_cache=False, **options)
        self.sync = None if fs.async_impl else fs
        self.fs = fs if fs.async_impl else AsyncFileSystemWrapper(fs, asynchronous=False)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self.fs.loop
        return loop

    async def stat(self, url: str) -> Stat:
        return _stat(await self.fs._info(self._path(url)))

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        got: bytes = await self.fs._cat_file(self._path(url), start=offset, end=offset + size)
        return got

    async def find(self, pattern: str) -> dict[str, Stat | None]:
        found = await self.fs._glob(self._path(pattern), detail=True)
        files = {path: info for path, info in sorted(found.items()) if info.get("type") == "file"}
        return {f"{self.scheme}://{path.lstrip('/')}": _stat(info) for path, info in files.items()}

    async def put(self, url: str, data: bytes) -> None:
        await self.fs._pipe_file(self._path(url), data)

    async def in_parts(self, url: str) -> Parts | None:
        return None

    async def put_file(self, url: str, path: Path) -> None:
        await self.fs._put_file(str(path), self._path(url))

    async def remove(self, url: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self.fs._rm_file(self._path(url))

    async def below(self, url: str) -> dict[str, int]:
        folder = self._path(url).rstrip("/") + "/"
        try:
            found = await self.fs._find(folder, detail=True)
        except FileNotFoundError:
            return {}
        return {
            path.removeprefix(folder): int(info["size"])
            for path, info in sorted(found.items())
            if path.startswith(folder) and info.get("type") == "file"
        }

    async def forget_parts(self, url: str) -> None:
        pass

    def _path(self, url: str) -> str:
        path: str = self.fs._strip_protocol(url)
        return path


class _File(_Any):
    """A folder that this machine has mounted. An object is written beside its name, and renamed."""

    async def put(self, url: str, data: bytes) -> None:
        parts = await self.in_parts(url)
        await parts.part(1, 0, data)
        await parts.finish()

    async def in_parts(self, url: str) -> _FileParts:
        final = Path(self._path(url))
        parts = _FileParts(final, final.with_name(f"{final.name}.part"))
        await asyncio.to_thread(parts.begin)
        return parts

    async def remove(self, url: str) -> None:
        path = Path(self._path(url))
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are in it
            path.parent.rmdir()


@dataclass(frozen=True)
class _FileParts:
    """A file that is being written."""

    final: Path
    begun: Path

    def begin(self) -> None:
        """Make it, empty."""
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.begun.write_bytes(b"")

    async def part(self, number: int, offset: int, data: bytes) -> None:
        await asyncio.to_thread(self._write, offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        with self.begun.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    async def finish(self) -> None:
        await asyncio.to_thread(self._publish)

    def _publish(self) -> None:
        with self.begun.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(self.begun, self.final)

    async def drop(self) -> None:
        self.begun.unlink(missing_ok=True)


class _S3(_Any):
    """Amazon's S3 and servers that speak like it: credentials, region and endpoint from AWS's own files."""

    def __init__(self, scheme: str) -> None:
        from botocore.session import get_session

        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS}
        anonymous = get_session().get_credentials() is None
        super().__init__(scheme, anon=anonymous, config_kwargs=config)
        self.fs.retries = 1  # persist() tries again, and says so

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        bucket, key, _ = self.fs.split_path(url)
        wanted = f"bytes={offset}-{offset + size - 1}"
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, IfMatch=version)
        async with answer["Body"] as body:
            got: bytes = await body.read()
        return got

    async def put(self, url: str, data: bytes) -> None:
        bucket, key, _ = self.fs.split_path(url)
        await self.fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data)

    async def in_parts(self, url: str) -> Parts:
        bucket, key, _ = self.fs.split_path(url)
        begun = await self.fs._call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        return _S3Parts(self.fs, {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}, {})

    async def forget_parts(self, url: str) -> None:
        bucket, key, _ = self.fs.split_path(url)
        found = await self.fs._call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key.rstrip("/") + "/")
        for one in found.get("Uploads", ()):
            where = {"Bucket": bucket, "Key": one["Key"], "UploadId": one["UploadId"]}
            await self.fs._call_s3("abort_multipart_upload", **where)


@dataclass(frozen=True)
class _S3Parts:
    """An upload of several parts. where: Bucket, Key and UploadId. tags: of the parts that are there."""

    fs: Any
    where: Mapping[str, str]
    tags: dict[int, str]

    async def part(self, number: int, offset: int, data: bytes) -> None:
        answer = await self.fs._call_s3("upload_part", PartNumber=number, Body=data, **self.where)
        self.tags[number] = answer["ETag"]

    async def finish(self) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self.tags.items())]
        await self.fs._call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self.where)

    async def drop(self) -> None:
        await self.fs._call_s3("abort_multipart_upload", **self.where)


class _Google(_Any):
    """Google's store, with Google's default credentials, or none for public buckets."""

    def __init__(self, scheme: str) -> None:
        from gcsfs.core import GCSFileSystem

        # The class that fsspec knows asks for the kind of bucket before each request, by gRPC, and waits for
        # a minute where that is not allowed.
        super().__init__(scheme, GCSFileSystem)

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        end = offset + size
        got: bytes = await self.fs._cat_file(self._path(url), start=offset, end=end, generation=version)
        return got


class _HuggingFace(_Any):
    """Files of a repository of Hugging Face's; the token is where `hf auth login` keeps it."""

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        return await asyncio.to_thread(self._read, url, offset, size)

    def _read(self, url: str, offset: int, size: int) -> bytes:
        assert self.sync is not None
        # Its caches read ahead, and without a size it lists the folder first.
        with self.sync.open(self._path(url), "rb", cache_type="none", size=offset + size) as file:
            file.seek(offset)
            got: bytes = file.read(size)
        return got


class _Http(_Any):
    """A web server that knows ranges; passwords from ~/.netrc, or of the URL."""

    def __init__(self, scheme: str) -> None:
        super().__init__(scheme, client_kwargs={"trust_env": True})

    async def stat(self, url: str) -> Stat:
        # One byte instead of HEAD: it shows whether the server knows ranges, and signed URLs allow GET alone.
        async with await self._answer(url, {"Range": "bytes=0-0"}) as answer:
            if answer.status == 416:  # an empty object has no byte
                return Stat(0, _version(answer.headers, 0))
            size = self._ranged(url, answer)
            return Stat(size, _version(answer.headers, size))

    async def get(self, url: str, offset: int, size: int, version: str) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        if version.startswith('"'):  # a strong ETag
            headers["If-Match"] = version
        async with await self._answer(url, headers) as answer:
            whole = self._ranged(url, answer)
            now = _version(answer.headers, whole)  # for servers that do not know the condition
            if now != version:
                raise Changed(f"its version was {version}, it is {now}")
            got: bytes = await answer.read()
        return got

    async def find(self, pattern: str) -> dict[str, Stat | None]:
        return dict.fromkeys(sorted(await self.fs._glob(pattern)))

    async def _answer(self, url: str, headers: Mapping[str, str]) -> Any:
        session = await self.fs.set_session()
        plain = {"Accept-Encoding": "identity"}  # a range of compressed bytes is not a range of the object
        return session.get(self.fs.encode_url(url), headers={**plain, **headers})

    def _ranged(self, url: str, answer: Any) -> int:
        """The size of the object, from an answer with a range of it."""
        if answer.status == 404:
            raise FileNotFoundError(public(url))
        answer.raise_for_status()
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status != 206 or not total.isdecimal():
            raise DataError(
                f"the server does not send ranges (HTTP {answer.status}), and would send the whole file for "
                "each sample; needed: a server that does, or the file on this machine"
            )
        return int(total)


def _stat(info: Mapping[str, Any]) -> Stat:
    if info.get("type") != "file" or info.get("size") is None:
        raise FileNotFoundError(str(info.get("name")))
    return Stat(int(info["size"]), _version(info, int(info["size"])))


def _version(info: Mapping[str, Any], size: int) -> str:
    for key in VERSIONS:
        found = info.get(key)
        if found and key in EXACT:
            return str(found)
        if found:  # a time may have seconds alone, in which an object may change twice
            at = found.timestamp() if isinstance(found, datetime) else found  # lists and objects differ here
            return f"{at}, {size} bytes"
    return f"{size} bytes"
