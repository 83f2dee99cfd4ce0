"""Whatever lies in a checkpoint's folder, nothing of it is executed: one message, exit code 4."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from mm.checkpoint.state import watched
from mm.cli import main
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from tests.mm.checkpoint.runs import contents, written

SHARD = "__0_0.distcp"
HOLES = "nearly all of them in holes"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "run", 1)


def sign(path: Path, **sizes: int) -> None:
    """A manifest that fits the files as they are now. sizes: of files that are not summed up."""
    listed = {n: manifest.entry_of(path / n) for n in manifest.names(path) if n not in sizes}
    manifest.write(path, listed | {n: manifest.Entry(size, "0" * 64) for n, size in sizes.items()})


def refused(path: Path, capsys: pytest.CaptureFixture[str], *, also: tuple[str, ...] = ()) -> str:
    """The one line that every command gives of a checkpoint."""
    said = ""
    for argv in (
        ["checkpoint", "verify", path],
        ["checkpoint", "inspect", path],
        ["checkpoint", "diff", path, path],
        ["checkpoint", "export", path, path.parent / "out"],
        ["checkpoint", "average", path.parent / "mean", path],
    ):
        if also and argv[1] not in also:
            continue
        code = main([str(a) for a in argv])
        out = capsys.readouterr()
        assert code == 4 and len(out.err.strip().splitlines()) == 1, (argv, code, out.err)
        assert "Traceback" not in out.err and "RAN" not in out.out
        said += out.err
    return said


class Evil:
    def __reduce__(self) -> Any:
        return print, ("RAN",)


def test_a_pickle_in_the_place_of_a_tensor_is_not_run(path: Path, capsys: Any) -> None:
    """In the zip of torch.save, of the right length, in a file whose sums fit."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    content = bytearray((path / SHARD).read_bytes())
    index = MetadataIndex("llm.head", torch.Size([0, 0]))
    info = metadata.storage_data[index]
    evil = io.BytesIO()
    torch.save({"x": Evil()}, evil)
    content[info.offset : info.offset + info.length] = evil.getvalue()
    grown = len(evil.getvalue()) - info.length
    for other in metadata.storage_data.values():
        other.offset += grown if other.offset > info.offset else 0
    info.length += grown
    (path / SHARD).write_bytes(bytes(content))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    assert "print" in refused(path, capsys, also=("diff", "average"))
    with pytest.raises(store.BadCheckpoint, match="print"):
        contents(path)
    assert "RAN" not in capsys.readouterr().out


def change_metadata(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        sign(path)

    return apply


def huge(metadata: Any) -> None:
    tensor = metadata.state_dict_metadata["llm.head"]
    tensor.size = tensor.chunks[0].sizes = torch.Size([1 << 30, 1 << 30])


def sparse(name: str, size: int) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        os.truncate(path / name, size)
        sign(path, **{name: size})

    return apply


def state(text: str) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        (path / store.STATE).write_text(text)
        sign(path)

    return apply


def pipe(name: str) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return apply


def link(name: str) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(path.parent / name)

    return apply


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor of 2^60 elements": (change_metadata(huge), "does not lie in"),
    "a sparse file of 1 TiB": (sparse(SHARD, 1 << 40), HOLES),
    "metadata of 1 TiB": (sparse(".metadata", 1 << 40), HOLES),
    "a state of 1 TiB": (sparse(store.STATE, 1 << 40), HOLES),
    "a shard that is too long": (sparse(SHARD, 1 << 20), "its tensors end at"),
    "a manifest of 1 TiB": (lambda p: os.truncate(p / store.MANIFEST, 1 << 40), "it is read up to"),
    "a state of many brackets": (state("[" * 100_000), "no readable state.json"),
    "a state that is a list": (state("[1]"), "does not say after which step"),
    "a step before the first": (state('{"step": -1}'), "does not say after which step"),
    "a state that is a pipe": (pipe(store.STATE), "state.json is missing"),
    "a manifest that is a pipe": (pipe(store.MANIFEST), "manifest.json is no plain file"),
    "a linked shard": (link(SHARD), "is a link"),
    "a linked manifest": (link(store.MANIFEST), "manifest.json is no plain file"),
    "many brackets for a manifest": (
        lambda p: (p / store.MANIFEST).write_text("[" * 100_000),
        "manifest.json is unreadable",
    ),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_it_is_refused_at_once(change: Callable[[Path], object], words: str, path: Path, capsys: Any) -> None:
    change(path)
    start = time.monotonic()
    said = refused(path, capsys)
    assert said.count(words) == 5, said
    assert time.monotonic() - start < 20


def test_no_rank_sums_up_holes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks for a checkpoint to resume from: its ranks share the files."""
    sparse(SHARD, 1 << 40)(path)
    summed, sum_up = list[str](), manifest.entry_of

    def watched(file: Path, *more: Any) -> manifest.Entry:
        summed.append(file.name)
        return sum_up(file, *more) if file.name != SHARD else manifest.Entry(0, "")

    monkeypatch.setattr(manifest, "entry_of", watched)
    found = [store.verify(path, part, 4) for part in range(4)]
    assert HOLES in found[0][0] and not any(found[1:])
    assert sorted(summed) == [".metadata", store.STATE]


def test_what_is_in_a_large_file_is_looked_for_in_its_holes(tmp_path: Path) -> None:
    """Also where it lies in many parts."""
    size = 1 << 29
    for parts, empty in ((1, True), (64, True), (1024, False)):
        file = tmp_path / f"{parts}"
        with file.open("wb") as f:
            for k in range(parts):
                f.seek(k * (size // parts))
                f.write(b"x" * 65536)
            f.truncate(size)
        assert manifest.hollow(file) is empty
        file.unlink()


ODD = ("config", "metrics", "config.checkpoint", "config.layout", "config.layout.llm")


@pytest.mark.parametrize("at", ODD)
@pytest.mark.parametrize("value", [None, 7, "text", [1], {"x": [None]}])
def test_a_state_of_any_shape_is_listed(at: str, value: Any, path: Path, capsys: Any) -> None:
    content: dict[str, Any] = {"step": 1, "config": {"checkpoint": {}, "layout": {"llm": {}}, "data": {}}}
    inner = content
    *before, last = at.split(".")
    for key in before:
        inner = inner[key]
    inner[last] = value
    state(json.dumps(content))(path)
    for argv in (["list", path.parent], ["prune", path.parent], ["diff", path, path]):
        assert main(["checkpoint", *map(str, argv)]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_that_were_watched_are_numbers(path: Path) -> None:
    good = {"left_out": [3], "losses": [2.5, 1], "high": 0, "back": 1}
    assert watched({"guard": good}, path) == good and watched({}, path) == {}
    odd = [{key: value} for key in good for value in (None, "x", {}, [None], [[1]])]
    for guard in [7, None, "x", [1], {**good, "other": 1}, *odd, {"high": [1]}, {"losses": 1.5}]:
        with pytest.raises(CheckpointError, match=r"state\.json does not say which numbers were watched"):
            watched({"guard": guard}, path)


@pytest.mark.parametrize("name", [store.MANIFEST, ".metadata", store.STATE])
def test_no_flipped_bit_is_more_than_damage(name: str, path: Path) -> None:
    """A bit of every byte of the manifest, and of some of the others, whose sums fit."""
    file = path / name
    good, survived = file.read_bytes(), 0
    for n in range(0, len(good), 1 if name == store.MANIFEST else 29):
        content = bytearray(good)
        content[n] ^= 1 << n % 8
        file.write_bytes(bytes(content))
        if name != store.MANIFEST:
            sign(path)
        try:
            wrong = store.structure(path)
            if not wrong:
                store.read_state(path), store.describe(path)
                survived += 1
        except store.BadCheckpoint:
            pass
    assert survived == 0 or name != store.MANIFEST
