"""Ranges of remote objects: the right bytes, from the cache or not, whatever the store does now and then."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm.data.remote.cache import BLOCK, WAYS
from mm.data.remote.client import IN_FLIGHT
from mm.data.remote.retry import Limits, Unreachable
from mm.data.remote.shards import FULL, REGION, RemoteShards
from mm.errors import DataError
from tests.mm.data.remote.stores import Faulty, memory, put

NAME = "memory://bucket/train-000000.tar"
SIZE = 5 * BLOCK + 777
DATA = random.Random(0).randbytes(SIZE)
ROOM = 4 * WAYS * (BLOCK + 64)
LIMITS = Limits(timeout_s=0.2, attempts=4, pause_s=0.001)

__all__ = ["memory"]


def shards(folder: Path, room: int = ROOM, said: list[str] | None = None) -> RemoteShards:
    return RemoteShards.of(folder, room, limits=LIMITS, warn=(said if said is not None else []).append)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranges=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 3 * BLOCK)), min_size=1, max_size=6),
    room=st.sampled_from([0, ROOM]),
)
def test_any_ranges_are_those_of_the_object(
    memory: Faulty, tmp_path: Path, ranges: list[tuple[int, int]], room: int
) -> None:
    put(NAME, DATA)
    remote = shards(tmp_path, room)
    found = remote.read_many([(NAME, *one) for one in ranges])
    assert found == [DATA[at : at + size] for at, size in ranges]
    assert found == [remote.read(NAME, *one) for one in ranges]
    assert memory.most <= IN_FLIGHT


def test_a_block_is_asked_for_once_and_neighbours_together(memory: Faulty, tmp_path: Path) -> None:
    put(NAME, DATA)
    shards(tmp_path).read(NAME, BLOCK + 5, 2 * BLOCK)
    assert memory.asked == [(NAME, BLOCK, 3 * BLOCK)]
    memory.asked.clear()
    other = shards(tmp_path)  # of another rank
    assert other.read(NAME, BLOCK, 3 * BLOCK) == DATA[BLOCK : 4 * BLOCK]
    assert not memory.asked
    wanted = [(NAME, 3, 5), (NAME, 9, 5), (NAME, 2 * BLOCK, 9), (NAME, SIZE - 3, 3)]
    assert other.read_many(wanted) == [DATA[at : at + size] for _, at, size in wanted]
    assert memory.asked == [(NAME, 0, BLOCK), (NAME, 5 * BLOCK, 777)]


def test_without_a_cache_nothing_but_the_range_is_asked_for(memory: Faulty, tmp_path: Path) -> None:
    put(NAME, DATA)
    shards(tmp_path, 0).read_many([(NAME, 7, 9), (NAME, BLOCK, 2)])
    assert memory.asked == [(NAME, 7, 9), (NAME, BLOCK, 2)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "faults",
    [
        [ConnectionResetError("reset"), TimeoutError("slow"), None],
        [lambda got: got[:-1], lambda got: b"", None],
        [1.0, None],  # a stall, longer than the limit
    ],
    ids=["errors", "short", "stall"],
)
def test_faults_that_pass_leave_the_right_bytes_and_a_line_each(
    memory: Faulty, tmp_path: Path, faults: list[object]
) -> None:
    put(NAME, DATA)
    said: list[str] = []
    remote = shards(tmp_path, said=said)
    remote.stat(NAME)
    memory.faults[:] = faults  # type: ignore[assignment]
    assert remote.read(NAME, 3, 100) == DATA[3:103]
    assert len(said) == len(faults) - 1 and all(f"bytes 0-{BLOCK} of {NAME}" in line for line in said)


def test_a_store_that_stays_away_is_named(memory: Faulty, tmp_path: Path) -> None:
    put(NAME, DATA)
    remote = shards(tmp_path)
    remote.stat(NAME)
    memory.faults[:] = [ConnectionResetError("reset")] * 9
    with pytest.raises(Unreachable, match=rf"bytes 0-{BLOCK} of {NAME}: .*reset; 4 attempts"):
        remote.read(NAME, 3, 100)
    assert len(memory.faults) == 5


def test_what_is_not_there_or_denied_is_not_asked_for_again(memory: Faulty, tmp_path: Path) -> None:
    remote = shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{NAME}: there is no such object"):
        remote.read(NAME, 0, 1)
    put(NAME, DATA)
    memory.faults[:] = [None, PermissionError("no")]
    with pytest.raises(PermissionError, match=f"of {NAME}: access is denied"):
        remote.read(NAME, 0, 1)


def test_a_cache_that_is_smaller_than_the_data_keeps_its_share_and_reads_the_rest_exactly(
    memory: Faulty, tmp_path: Path
) -> None:
    names = [f"memory://b/t-{k}.tar" for k in range(4)]
    for name in names:
        put(name, bytes(10 * REGION))
    room = round(20 * REGION / FULL)  # for half of it
    epochs = []
    for _ in range(3):  # ranks, or runs
        remote = shards(tmp_path, room)
        remote.find("memory://b/t-*.tar")
        memory.asked.clear()
        for name in names:
            remote.read_many([(name, k * REGION + 5, 3000) for k in range(10)])
        epochs.append(sorted(memory.asked))
    first, second, third = ([size for _, _, size in asked] for asked in epochs)
    assert len(first) == 40 and set(first) == {3000, BLOCK}
    assert 8 < first.count(BLOCK) < 32
    assert second == third == [3000] * first.count(3000)


def test_patterns_find_what_globs_and_braces_match_in_order(memory: Faulty, tmp_path: Path) -> None:
    for n in range(12):
        put(f"memory://b/t-{n:02d}.tar", b"x" * n)
    put("memory://b/deep/t-00.tar", b"")
    remote = shards(tmp_path)
    assert remote.find("memory://b/t-*.tar") == [f"memory://b/t-{n:02d}.tar" for n in range(12)]
    some = [f"memory://b/t-{n:02d}.tar" for n in (11, 3)]
    assert remote.find("memory://b/t-{11,77,03}.tar") == some
    many = remote.find("memory://b/t-{02..40}.tar")  # more names than are asked for one by one
    assert many == [f"memory://b/t-{n:02d}.tar" for n in range(2, 12)]
    assert remote.stat(many[3]).size == 5
    assert remote.find("memory://b/none-*.tar") == []
    with pytest.raises(DataError, match=r"unknown scheme ftp"):
        remote.find("ftp://b/x.tar")


def test_a_local_copy_is_read_once_fills_the_cache_and_goes(memory: Faulty, tmp_path: Path) -> None:
    put(NAME, DATA)
    remote = shards(tmp_path)
    with remote.local(NAME) as path:
        assert path.read_bytes() == DATA
    assert not path.exists() and sum(size for _, _, size in memory.asked) == SIZE
    memory.asked.clear()
    assert remote.read(NAME, 0, SIZE) == DATA
    assert not memory.asked


def test_it_goes_to_another_process_without_its_connections(memory: Faulty, tmp_path: Path) -> None:
    put(NAME, DATA)
    remote = RemoteShards.of(tmp_path, ROOM, patterns=["https://u:SECRET@h/x.tar"])
    remote.read(NAME, 0, 9)
    again = pickle.loads(pickle.dumps(remote))
    assert again.read(NAME, 4, 9) == DATA[4:13]
    assert "SECRET" not in repr(remote)


def test_side_files_are_told_apart_by_the_folder_of_the_url(tmp_path: Path) -> None:
    remote = shards(tmp_path)
    folders = [remote.sidecars(f"s3://{place}.tar") for place in ("a/train-0", "a/train-1", "b/train-0")]
    assert folders[0] == folders[1] != folders[2]
    assert (folders[2] / "url").read_text() == "s3://b\n" and folders[2].parent == tmp_path / "index"
