"""A run opens no port but those of its ranks' meeting, at no address but the one asked for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mm.ranks import launch, rendezvous
from tests.mm.harness import free_port
from tests.mm.jobs.test_job import ROOT, children, environment, sensor_config
from tests.mm.shards import sensor_samples, write_shard

TABLE = Path("/proc/self/net/tcp")
pytestmark = pytest.mark.skipif(not TABLE.exists(), reason="no table of sockets")
LISTENS, HERE = "0A", "0100007F"  # 127.0.0.1, as the kernel writes it


def addresses(pid: int) -> set[str]:
    """The addresses that a process listens at; those of IPv6 too. None once it has ended."""
    own, found = set(), set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                own.add(os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        for name in ("tcp", "tcp6"):
            table = Path(f"/proc/{pid}/net/{name}")
            lines = table.read_text().splitlines()[1:] if table.exists() else []
            rows = [line.split() for line in lines]
            found |= {row[1].partition(":")[0] for row in rows if row[3] == LISTENS and row[9] in own}
    except OSError:
        pass  # the process is gone
    return found


def test_listeners_are_seen() -> None:
    before = addresses(os.getpid())
    with socket.create_server(("127.0.0.1", 0)):
        assert HERE in addresses(os.getpid())
    with socket.create_server(("", 0)):
        assert "00000000" in addresses(os.getpid())
    assert addresses(os.getpid()) == before


def test_a_rank_that_hosts_the_store_listens_at_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    before = addresses(os.getpid())
    store = rendezvous.connect(10.0, hosts=True)
    assert addresses(os.getpid()) - before <= {HERE}
    rendezvous.connect(10.0).set("here", "1")
    store.wait(["here"], timedelta(seconds=10))
    taken = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
    with pytest.raises(RuntimeError, match="the port is taken"):
        rendezvous.connect(1.0, hosts=True)
    taken.close()


@pytest.mark.parametrize("given", [None, "eth7"])
def test_ranks_of_one_machine_meet_inside_it(
    given: str | None, monkeypatch: pytest.MonkeyPatch, processes: None
) -> None:
    seen: list[Mapping[str, str]] = []

    def start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        seen.append(env)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(launch, "_start", start)
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    assert launch.launch_local(1, []) == 0
    assert seen[0]["GLOO_SOCKET_IFNAME"] == (given or "lo")


@pytest.mark.slow
def test_a_whole_run_listens_at_this_machines_own_address(tmp_path: Path, processes: Any) -> None:
    write_shard(tmp_path / "sensor-000000.tar", sensor_samples(8))
    argv = [sys.executable, "-m", "mm", "train", str(sensor_config(tmp_path)), "train.steps=3"]
    run = subprocess.Popen(argv, cwd=ROOT, env=environment())
    seen: set[str] = set()
    while run.poll() is None:
        for pid in (run.pid, *children(run.pid)):
            seen |= addresses(pid)
    assert run.returncode == 0 and seen == {HERE}
