"""Whatever lies in a checkpoint's folder, nothing of it is executed: one message, exit code 4."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from mm.checkpoint.kept import metric_of
from mm.checkpoint.state import candidates, watched
from mm.cli import main
from mm.config.schema import CheckpointConfig
from mm.errors import CheckpointError
from parallel import checkpoint as store
from parallel.checkpoint import manifest
from parallel.checkpoint.plain import why_not_plain
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


def replace_head(path: Path, evil: bytes) -> None:
    """Put bytes in the place of the tensor llm.head, with sums, offsets and lengths that fit."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    content = bytearray((path / SHARD).read_bytes())
    info = metadata.storage_data[MetadataIndex("llm.head", torch.Size([0, 0]))]
    content[info.offset : info.offset + info.length] = evil
    grown = len(evil) - info.length
    for other in metadata.storage_data.values():
        other.offset += grown if other.offset > info.offset else 0
    info.length += grown
    (path / SHARD).write_bytes(bytes(content))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


def saved(what: Any) -> bytes:
    out = io.BytesIO()
    torch.save(what, out)
    return out.getvalue()


def zipped(pickled: bytes | None = None, method: int = zipfile.ZIP_STORED, rows: int = 5) -> bytes:
    """What torch saves of a tensor, with another pickle, or other packing."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(rows, 3)))) as was,
        zipfile.ZipFile(out, "w", method) as z,
    ):
        for name in was.namelist():
            z.writestr(name, pickled if pickled and name.endswith("data.pkl") else was.read(name))
        z.writestr("archive/padding", b"x" * 300)
    return out.getvalue()


def called(function: str, *arguments: Any) -> bytes:
    """A pickle that calls a function with plain arguments."""
    return b"c" + function.replace(".", "\n").encode() + b"\n" + pickle.dumps(arguments, 2)[2:-1] + b"R."


HEADS: dict[str, tuple[bytes, str]] = {
    "a pickle that runs code": (saved({"x": Evil()}), "opcode|builtins.print"),
    "a bytearray of 1 TiB": (zipped(called("builtins.bytearray", 1 << 40)), "names builtins.bytearray"),
    "records packed a thousand to one": (zipped(method=zipfile.ZIP_DEFLATED, rows=1 << 22), "packed records"),
    "tensors without end": (zipped(b"\x80\x02" + b")" * 20_000 + b"."), "no pickle of a tensor's size"),
    "a list of tensors": (saved([torch.zeros(5, 3)] * 2), "opcode"),
    "an older format": (pickle.dumps(0x1950A86A20F9469CFC6C, 2) * 40, "it is no zip"),
    "half a zip": (zipped()[:-30], "not a zip file|File is"),
}


@pytest.mark.parametrize(("evil", "words"), HEADS.values(), ids=HEADS.keys())
def test_what_is_no_plain_tensor_is_not_made(evil: bytes, words: str, path: Path, capsys: Any) -> None:
    """In the place of a tensor, of the right length, in a file whose sums fit."""
    replace_head(path, evil)
    said = refused(path, capsys, also=("diff", "average"))
    assert len(re.findall(f"llm.head in {SHARD} is no plain tensor: .*({words})", said)) == 2, said
    with pytest.raises(store.BadCheckpoint, match="is no plain tensor"):
        contents(path)
    assert "RAN" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.uint16])
def test_what_torch_saves_of_a_tensor_is_plain(dtype: torch.dtype) -> None:
    for tensor in (
        torch.ones((), dtype=dtype),
        torch.ones(2, 3, dtype=dtype).t(),
        torch.ones(0, dtype=dtype),
    ):
        content = saved(tensor)
        assert why_not_plain(io.BytesIO(b"before" + content + b"after"), 6, len(content)) == ""
    content = saved(torch.nn.Parameter(torch.ones(2)))
    assert why_not_plain(io.BytesIO(content), 0, len(content)) == ""


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
    "a format of a later version": (
        state('{"step": 1, "format": 2}'),
        "has format 2, and this version reads",
    ),
    "a format that is no number": (state('{"step": 1, "format": "x"}'), "has format 'x', and this version"),
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00001-of-00002.safetensors", "it is a published folder .* `checkpoint import FOLDER NEW`"),
        ("pytorch_model.bin", "it has pickles .*, which are never read; needed: .*safetensors"),
    ],
)
def test_a_folder_of_others_is_no_damaged_checkpoint(
    name: str, words: str, tmp_path: Path, capsys: Any
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / name).write_bytes(b"")
    assert len(re.findall(words, refused(theirs, capsys))) == 5
    for argv in (["list", theirs], ["prune", theirs]):
        assert main(["checkpoint", *map(str, argv)]) == 4
        assert re.search(words, capsys.readouterr().err)
    rules = CheckpointConfig(resume=str(theirs))
    with pytest.raises(CheckpointError, match=rf"^checkpoint\.resume={theirs}: {words}"):
        candidates(SimpleNamespace(checkpoint=rules), tmp_path)  # type: ignore[arg-type]


def test_a_folder_of_nothing_is_no_damaged_checkpoint(tmp_path: Path, capsys: Any) -> None:
    empty, begun = tmp_path / "empty", tmp_path / "step-00000007"
    empty.mkdir(), begun.mkdir()
    assert refused(empty, capsys).count("it has no file of a checkpoint; needed: the folder of one") == 5
    assert refused(begun, capsys).count("damaged: manifest.json is missing") == 5


def test_a_metric_is_a_number_of_a_float() -> None:
    odd = (10**400, float("nan"), float("inf"), "2", None)
    assert [metric_of({"metrics": {"loss": value}}, "loss") for value in (2, 2.5, *odd)] == [
        2.0,
        2.5,
        *[None] * 5,
    ]


def test_numbers_that_were_watched_are_numbers(path: Path) -> None:
    good = {"left_out": [3], "losses": [2.5, 1], "high": 0, "back": 1}
    assert watched({"guard": good}, path) == good and watched({}, path) == {}
    odd = [{key: value} for key in good for value in (None, "x", {}, -1, [None], [[1]])]
    odd += [{"left_out": [-1]}, *({"losses": [value]} for value in (float("nan"), float("inf"), 10**400))]
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
