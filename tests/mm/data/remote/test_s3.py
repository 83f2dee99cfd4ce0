"""Shards of a real S3 server, which the test starts, with faults on the way to it."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.data.remote.cache import BLOCK, WAYS
from mm.data.remote.retry import Changed, Limits, Unreachable
from mm.data.remote.shards import RemoteShards
from tests.mm.data.remote.server import Server, s3_for_the_process

NEEDED = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDED), reason=f"{NEEDED} not installed: pip install -e '.[remote,remote-test]'"
    ),
]
DATA = random.Random(0).randbytes(3 * BLOCK + 99)
LIMITS = Limits(timeout_s=2.0, attempts=4, pause_s=0.01)
NAMES = [f"s3://shards/train-{n:06d}.tar" for n in range(12)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_for_the_process("SECRET") as server:
        yield server


@pytest.fixture
def bucket(server: Server, processes: None) -> Server:
    """The server with twelve shards, without faults, and with nothing asked."""
    import fsspec

    server.faults.clear()
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    if not fs.exists("shards"):
        fs.mkdir("shards")
    for n, name in enumerate(NAMES):
        fs.pipe_file(name, DATA[n:])
    server.asked.clear()
    return server


def shards(folder: Path, said: list[str] | None = None, room: int = 4 * WAYS * (BLOCK + 64)) -> RemoteShards:
    return RemoteShards.of(folder, room, limits=LIMITS, warn=(said if said is not None else []).append)


def test_patterns_and_ranges(bucket: Server, tmp_path: Path) -> None:
    remote = shards(tmp_path)
    assert remote.find("s3://shards/train-*.tar") == NAMES
    assert remote.find("s3://shards/train-{000000..000020}.tar") == NAMES
    assert remote.find("s3://shards/{other,train}-{000003,000099}.tar") == [NAMES[3]]
    assert remote.find("s3://shards/none-*.tar") == remote.find("s3://nobucket/x.tar") == []
    bucket.asked.clear()
    wanted = [(NAMES[n], 7 * n, 5000 * n) for n in range(12)]
    assert remote.read_many(wanted) == [DATA[n:][7 * n : 5007 * n] for n in range(12)]
    assert len(bucket.ranges()) == 11  # sizes and versions are those of the list, and an empty range is free
    assert not any("if-match" not in headers for _, _, headers in bucket.asked)
    bucket.asked.clear()
    assert shards(tmp_path).read_many(wanted[:1]) == [b""]
    remote.read_many(wanted)
    assert not bucket.ranges()


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "stall"])
def test_faults_that_pass(bucket: Server, tmp_path: Path, fault: str) -> None:
    said: list[str] = []
    remote = shards(tmp_path, said)
    remote.find(NAMES[0])
    bucket.stall_s = 3.0
    bucket.faults += [fault, fault] if fault != "stall" else [fault]
    assert remote.read(NAMES[0], 10, 2 * BLOCK) == DATA[10 : 10 + 2 * BLOCK]
    assert not bucket.faults
    # aiohttp itself tries once more where a connection that it has used before is reset.
    assert len(said) == (1 if fault in ("stall", "reset") else 2)
    assert all(f"of {NAMES[0]}: " in line for line in said)


def test_it_gives_up_in_a_sentence(bucket: Server, tmp_path: Path) -> None:
    remote = shards(tmp_path)
    remote.find(NAMES[0])
    bucket.faults += ["503"] * 9
    with pytest.raises(Unreachable, match=rf"of {NAMES[0]}: .*\(HTTP 503\).*; 4 attempts have failed"):
        remote.read(NAMES[0], 10, 20)
    assert len(bucket.faults) == 5


def test_denied_and_missing_objects_are_asked_for_once(bucket: Server, tmp_path: Path) -> None:
    said: list[str] = []
    remote = shards(tmp_path, said)
    remote.find(NAMES[0])
    bucket.faults += ["403"]
    with pytest.raises(PermissionError, match=rf"of {NAMES[0]}: access is denied"):
        remote.read(NAMES[0], 10, 20)
    with pytest.raises(FileNotFoundError, match=r"s3://shards/none.tar: there is no such object"):
        remote.read("s3://shards/none.tar", 10, 20)
    assert not said


def test_an_object_that_changes_between_reads_is_named(bucket: Server, tmp_path: Path) -> None:
    import fsspec

    remote = shards(tmp_path)
    assert remote.read(NAMES[0], 0, 9) == DATA[:9]
    fsspec.filesystem("s3").pipe_file(NAMES[0], DATA[::-1])  # as long as before
    with pytest.raises(Changed, match=f"{NAMES[0]}: it has changed since it was indexed"):
        remote.read(NAMES[0], 2 * BLOCK, 9)
    other = shards(tmp_path)  # a later run, with the same folder
    assert other.read(NAMES[0], 0, 9) == DATA[::-1][:9]


def test_a_copy_for_a_scan_streams_each_byte_once_in_spite_of_faults(bucket: Server, tmp_path: Path) -> None:
    said: list[str] = []
    remote = shards(tmp_path, said)
    bucket.faults += ["short", "500"]
    with remote.local(NAMES[1]) as path:
        assert path.read_bytes() == DATA[1:]
    assert len(bucket.ranges()) == 3 and len(said) == 2


def test_a_forked_process_has_connections_of_its_own(bucket: Server, tmp_path: Path) -> None:
    remote = shards(tmp_path, room=0)
    assert remote.read(NAMES[0], 3, 9) == DATA[3:12]
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.read(NAMES[1], 3, 9) == DATA[4:13] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert remote.read(NAMES[0], 5, 9) == DATA[5:14]
