"""Where the disk is full, files that are written once are what they were, and the run ends in words."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mm.checkpoint.room import writing_to
from mm.errors import CheckpointError
from parallel import checkpoint as store


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """In this process, as a quota would have it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_what_it_was_where_it_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    store.write_whole(file, "old")
    with (
        pytest.raises(CheckpointError, match=r"cannot be written to: .*large \(\d+ MiB free\); its c"),
        no_file_longer_than(10),
        writing_to(tmp_path),
    ):
        store.write_whole(file, "new" * 10)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [file.name]
    store.write_whole(file, "new")
    assert file.read_text() == "new"
