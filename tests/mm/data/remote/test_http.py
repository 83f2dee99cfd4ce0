"""Shards of a web server: ranges alone, conditions, passwords, and servers that know no ranges."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mm.data.remote.cache import BLOCK, WAYS
from mm.data.remote.retry import Changed, Limits, Unreachable
from mm.data.remote.shards import RemoteShards
from mm.errors import DataError
from tests.mm.data.remote.server import files, serving

pytest.importorskip("aiohttp", reason="aiohttp is in the extra remote")
DATA = random.Random(0).randbytes(2 * BLOCK + 99)
LIMITS = Limits(timeout_s=1.0, attempts=4, pause_s=0.001)


def shards(folder: Path, pattern: str, said: list[str], room: int = WAYS * (BLOCK + 64)) -> RemoteShards:
    return RemoteShards.of(folder, room, patterns=[pattern], limits=LIMITS, warn=said.append)


@pytest.mark.parametrize("etags", [True, False])
def test_ranges_of_files_found_by_braces(tmp_path: Path, etags: bool) -> None:
    with serving(
        files({"/d/s-0.tar": DATA, "/d/s-2.tar": DATA[::-1], "/d/empty.tar": b""}, etags=etags)
    ) as server:
        pattern = f"{server.url}/d/{{s-0,s-1,s-2,empty}}.tar"
        remote = shards(tmp_path, pattern, [])
        found = remote.find(pattern)
        assert found == [f"{server.url}/d/{name}.tar" for name in ("s-0", "s-2", "empty")]
        wanted = [(found[0], BLOCK - 3, 9), (found[1], 5, 7), (found[0], len(DATA) - 2, 50), (found[2], 0, 5)]
        assert remote.read_many(wanted) == [DATA[BLOCK - 3 : BLOCK + 6], DATA[::-1][5:12], DATA[-2:], b""]
        with remote.local(found[0]) as path:
            assert path.read_bytes() == DATA
        assert all("range" in headers for _, _, headers in server.asked)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "stall"])
def test_faults_that_pass(tmp_path: Path, fault: str) -> None:
    with serving(files({"/s.tar": DATA})) as server:
        name, said = f"{server.url}/s.tar", list[str]()
        remote = shards(tmp_path, name, said)
        remote.find(name)
        server.faults += [fault, fault] if fault != "stall" else [fault]
        assert remote.read(name, 10, 2 * BLOCK) == DATA[10 : 10 + 2 * BLOCK]
        assert said and all(f"of {name}" in line for line in said)


def test_a_server_that_stays_away_ends_in_a_sentence(tmp_path: Path) -> None:
    with serving(files({"/s.tar": DATA})) as server:
        name = f"{server.url}/s.tar"
        remote = shards(tmp_path, name, [])
        remote.find(name)
        server.faults += ["reset"] * 20
        with pytest.raises(Unreachable, match=rf"of {name}: .*; 4 attempts have failed"):
            remote.read(name, 10, 20)


def test_an_object_that_changes_between_reads_is_named(tmp_path: Path) -> None:
    data = {"/s.tar": DATA}
    for etags in (True, False):  # a server without them tells the size alone
        data["/s.tar"] = DATA
        with serving(files(data, etags=etags)) as server:
            name = f"{server.url}/s.tar"
            remote = shards(tmp_path, name, [], room=0)
            assert remote.read(name, 0, 5) == DATA[:5]
            data["/s.tar"] = b"x" + DATA
            with pytest.raises(Changed, match=f"{name}: it has changed"):
                remote.read(name, 50, 5)


def test_a_server_without_ranges_is_refused_before_a_byte_is_wasted(tmp_path: Path) -> None:
    with serving(files({"/s.tar": DATA}, ranges=False)) as server:
        with pytest.raises(DataError, match=rf"{server.url}/s.tar: .*does not send ranges \(HTTP 200\)"):
            shards(tmp_path, "", []).find(f"{server.url}/s.tar")
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", ["403", "401"])
def test_passwords_and_signatures_go_into_requests_alone(tmp_path: Path, status: str) -> None:
    with serving(files({"/s.tar": DATA})) as server:
        host = server.url.removeprefix("http://")
        url, said = f"http://user:PASSWORD@{host}/s.tar?sig=TOKEN", list[str]()
        remote = shards(tmp_path, url, said)
        (name,) = remote.find(url)
        assert name == f"http://{host}/s.tar"
        assert remote.read(name, 3, 9) == DATA[3:12]
        assert all(path == "/s.tar?sig=TOKEN" for _, path, _ in server.asked)
        assert all(h["authorization"].startswith("Basic ") for _, _, h in server.asked)
        server.faults += ["500", status]
        with pytest.raises(PermissionError, match=f"{name}: access is denied") as raised:
            remote.read(name, 2 * BLOCK, 9)
        shown = f"{raised.value!r} {said} {name} {remote!r} {[p.name for p in tmp_path.rglob('*')]}"
        assert said and "PASSWORD" not in shown and "TOKEN" not in shown
