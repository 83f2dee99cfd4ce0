"""The cache: bounded, right whatever happens to its files, and useful where it is smaller than the data."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from mm.data.remote.cache import BLOCK, WAYS, BlockCache, block_key

ROOM = WAYS * (BLOCK + 64)  # bytes for WAYS blocks


def data_of(n: int, size: int = 100) -> bytes:
    return n.to_bytes(8, "little") * (size // 8) + b"." * (size % 8)


def key_of(n: int) -> bytes:
    return block_key("s3://b/k", "v1", n)


def disk(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.iterdir())


def test_a_block_is_found_by_another_process_until_its_object_changes(tmp_path: Path) -> None:
    BlockCache(tmp_path, ROOM).put(key_of(1), data_of(1))
    other = BlockCache(tmp_path, ROOM)
    assert other.get(key_of(1), 100) == data_of(1)
    assert other.get(block_key("s3://b/k", "v2", 1), 100) is None
    assert other.get(block_key("s3://b/other", "v1", 1), 100) is None
    assert other.get(key_of(1), 99) is None  # the sum is of all of it


def test_its_size_is_bounded(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 2 * ROOM)
    for n in range(5 * WAYS):
        cache.put(key_of(n), data_of(n, BLOCK))
    assert disk(tmp_path) <= 2 * ROOM
    kept = [n for n in range(5 * WAYS) if cache.get(key_of(n), BLOCK) == data_of(n, BLOCK)]
    assert 1.9 * WAYS < len(kept) <= 2 * WAYS


def test_a_block_finds_a_place_and_others_leave_in_time(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, ROOM)
    for n in range(WAYS):
        cache.put(key_of(n), data_of(n))
        assert cache.get(key_of(n), 100) == data_of(n)
    assert all(cache.get(key_of(n), 100) == data_of(n) for n in range(WAYS))
    for n in range(WAYS, 20 * WAYS):
        cache.put(key_of(n), data_of(n))
        assert cache.get(key_of(n), 100) == data_of(n)
    assert not any(cache.get(key_of(n), 100) for n in range(WAYS))


@pytest.mark.parametrize("kind", ["entries", "blocks"])
def test_damage_is_noticed_and_healed(tmp_path: Path, kind: str) -> None:
    cache = BlockCache(tmp_path, ROOM)
    cache.put(key_of(1), data_of(1))
    (path,) = tmp_path.glob(f"{kind}-*")
    whole = path.read_bytes()
    for at in [i for i, byte in enumerate(whole) if byte][:: 1 + len(whole) // 4000]:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 0x10]))
        assert cache.get(key_of(1), 100) is None, at
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    os.truncate(path, 0)
    assert cache.get(key_of(1), 100) is None
    cache.put(key_of(1), data_of(1))
    assert cache.get(key_of(1), 100) == data_of(1)


def test_writers_of_one_place_never_show_a_mixture(tmp_path: Path) -> None:
    """Four caches of one folder, as ranks have them, write and read the same few keys with other bytes."""
    wrong: list[int] = []

    def work(seed: int) -> None:
        cache, draw = BlockCache(tmp_path, ROOM), random.Random(seed)
        for _ in range(150):
            n = draw.randrange(2 * WAYS)
            found = cache.get(key_of(n), 9000)
            if found is None:
                cache.put(key_of(n), data_of(n, 9000))
            elif found != data_of(n, 9000):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_limit_starts_again_and_no_room_keeps_nothing(tmp_path: Path) -> None:
    BlockCache(tmp_path, ROOM).put(key_of(1), data_of(1))
    (tmp_path / "index").mkdir()
    BlockCache(tmp_path, 2 * ROOM).put(key_of(2), data_of(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blocks-2", "entries-2", "index"]
    none = BlockCache(tmp_path, ROOM - 100 * WAYS)
    none.put(key_of(1), data_of(1))
    assert none.get(key_of(1), 100) is None


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache = BlockCache(tmp_path / "file", ROOM, said.append)
    for n in range(3):
        cache.put(key_of(n), data_of(n))
        assert cache.get(key_of(n), 100) is None
    assert len(said) == 1 and "cannot keep blocks" in said[0]
