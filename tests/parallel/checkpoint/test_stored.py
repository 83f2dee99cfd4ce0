"""Checkpoint files are untrusted: an unlisted file is refused, and no code of a pickle is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import checkpoint as store
from parallel.checkpoint import manifest

Change = Callable[[Path], object]
NAMES = torch.distributed.checkpoint.metadata.__name__


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of two tensors, written by a group of one."""
    folder = tmp_path_factory.mktemp("written")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.0)}
        yield store.save(folder, 3, tensors, {"words": "kept"}, keep=0)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def sign(path: Path) -> None:
    """A manifest that fits the files as they are now."""
    manifest.write(path, {n: manifest.entry_of(path / n) for n in manifest.names(path)})


def read(path: Path) -> dict[str, torch.Tensor]:
    out = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    assert store.load(path, out) == {"step": 3, "format": 1, "words": "kept"}
    return out


def test_what_was_written_is_read(path: Path) -> None:
    assert not store.verify(path) and store.describe(path) == {
        "a": ((2, 3), torch.float32),
        "b": ((), torch.float32),
    }
    assert read(path)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def edit(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(path: Path) -> None:
        listed = json.loads((path / manifest.MANIFEST).read_text())
        change(listed)
        (path / manifest.MANIFEST).write_text(json.dumps(listed))

    return apply


def text(content: str) -> Change:
    return lambda path: (path / manifest.MANIFEST).write_text(content)


def flip(path: Path) -> None:
    part = path / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[content.index(struct.pack("<f", 5.0))] ^= 1
    part.write_bytes(bytes(content))


def both(*changes: Change) -> Change:
    return lambda path: [change(path) for change in changes]


def drop(*names: str) -> Change:
    return edit(lambda listed: [listed.pop(n) for n in names])


WRONG: dict[str, tuple[Change, str]] = {
    "flipped": (flip, "__0_0.distcp differs from what was written"),
    "empty": (both(text("{}"), flip), "manifest.json lists no file"),
    "a list": (text("[]"), "manifest.json is no list of files by name"),
    "null": (text("null"), "manifest.json is no list"),
    "truncated": (text('{"state.json": {"by'), "manifest.json is unreadable"),
    "gone": (lambda path: (path / manifest.MANIFEST).unlink(), "manifest.json is missing"),
    "an entry of null": (edit(lambda m: m.update({"state.json": None})), "manifest.json differs"),
    "unsigned, an entry of null": (
        both(drop(manifest.MANIFEST), edit(lambda m: m.update({"state.json": None}))),
        "the entry of 'state.json' is no size and sha256",
    ),
    "unsigned, a size in words": (
        both(drop(manifest.MANIFEST), edit(lambda m: m["state.json"].update(bytes="1"))),
        "the entry of 'state.json' is no size",
    ),
    "unsigned, outside": (
        both(drop(manifest.MANIFEST), edit(lambda m: m.update({"../x": m["state.json"]}))),
        "the entry of '../x' is no size and sha256 of a file of this folder",
    ),
    "a lost entry": (both(drop("__0_0.distcp"), flip), "manifest.json differs from what was written"),
    "unsigned, a lost entry": (
        both(drop("__0_0.distcp", manifest.MANIFEST), flip),
        "__0_0.distcp is not listed",
    ),
    "another file": (lambda path: (path / "x").touch(), "x is not listed in manifest.json"),
    "longer": (lambda path: (path / "__0_0.distcp").open("ab").write(b"x"), "bytes"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_as_listed_is_reported(change: Change, message: str, path: Path) -> None:
    change(path)
    errors = store.verify(path)
    assert errors and message in errors[0]
    if change is not flip:
        assert store.structure(path)  # without reading the files


def test_what_is_read_is_summed_when_it_is_read(path: Path) -> None:
    (path / store.STATE).write_text((path / store.STATE).read_text().replace("kept", "kapt"))
    with pytest.raises(store.BadCheckpoint, match=r"state.json differs from what was written"):
        store.read_state(path)


def test_a_manifest_of_before_its_own_sum_is_read(path: Path) -> None:
    drop(manifest.MANIFEST)(path)
    assert not store.verify(path) and read(path)["b"] == 2


def test_processes_share_the_work_of_verifying(path: Path) -> None:
    flip(path)
    assert not store.verify(path, 1, 2) and len(store.verify(path, 0, 2)) == 1  # the largest file comes first
    (path / store.STATE).write_bytes(bytes((path / store.STATE).stat().st_size))
    parts = [store.verify(path, k, 3) for k in range(3)]
    assert sorted(len(p) for p in parts) == [0, 1, 1]


class Does:
    """Unpickled, it calls `fn`."""

    def __init__(self, fn: Any, *args: Any) -> None:
        self.call = fn, args

    def __reduce__(self) -> Any:
        return self.call


def plain(value: Any) -> bytes:
    """The operations that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def a_field_that_is_code(code: str) -> bytes:
    """dataclass() and field(), which torch's module imports: a class of torch's gets a field whose name is
    code, and dataclass() writes it into the source of __init__, as the default of a parameter."""
    name = f"x={code},*y"
    field = pickle.GLOBAL + f"{NAMES}\nfield\n".encode() + pickle.EMPTY_TUPLE + pickle.REDUCE
    field += plain((None, {"init": False})) + pickle.BUILD
    attributes = pickle.EMPTY_DICT + plain(name) + field + pickle.SETITEM
    attributes += plain("__annotations__") + plain({name: 1}) + pickle.SETITEM
    dataclass = pickle.GLOBAL + f"{NAMES}\ndataclass\n".encode()
    of = pickle.GLOBAL + f"{NAMES}\nStorageMeta\n".encode()
    of += pickle.NONE + attributes + pickle.TUPLE2 + pickle.BUILD
    return pickle.PROTO + b"\x02" + dataclass + of + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def an_attribute_of_what_is_allowed(code: str) -> bytes:
    """os.system, as an attribute of a module that a class's module imports."""
    names = plain(NAMES) + plain("os.system")
    return pickle.PROTO + b"\x04" + names + pickle.STACK_GLOBAL + plain((code,)) + pickle.REDUCE + pickle.STOP


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that make the file `mark` where they are run."""
    code, shell = f"open({str(mark)!r}, 'w')", f"touch {mark}"
    inner = {"a": Does(os.system, shell)}
    metadata = torch.distributed.checkpoint.metadata.Metadata
    return {
        "os.system": pickle.dumps(Does(os.system, shell)),
        "eval": pickle.dumps(Does(eval, code)),
        "nested": pickle.dumps(metadata(inner)),  # type: ignore[arg-type]
        "nested in what is not read": pickle.dumps(metadata({}, planner_data=[Does(exec, code)])),
        "torch.load": pickle.dumps(Does(torch.load, io.BytesIO(pickle.dumps(Does(eval, code))))),
        "a field": a_field_that_is_code(code),
        "an attribute": an_attribute_of_what_is_allowed(shell),
    }


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_hostile_metadata_are_refused_and_nothing_is_run(kind: str, path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (path / ".metadata").write_bytes(hostile(mark)[kind])
    sign(path)
    assert not store.verify(path)
    with pytest.raises(store.BadCheckpoint, match="refusing to load"):
        store.describe(path)
    with pytest.raises(store.BadCheckpoint, match="refusing to load"):
        read(path)
    assert not mark.exists()


@pytest.mark.parametrize("plain", [False, True])
def test_a_hostile_tensor_is_refused_and_nothing_is_run(plain: bool, path: Path, tmp_path: Path) -> None:
    mark, payload = tmp_path / "ran", io.BytesIO()
    evil = Does(eval, f"open({str(mark)!r}, 'w')")
    torch.save(evil, payload, _use_new_zipfile_serialization=not plain)
    change_metadata(path, lambda m: [setattr(i, "length", payload.tell()) for i in storage_infos(m)])
    change_metadata(path, lambda m: [setattr(i, "offset", 0) for i in storage_infos(m)])
    (path / "__0_0.distcp").write_bytes(payload.getvalue())
    sign(path)
    with pytest.raises(store.BadCheckpoint, match="cannot be read"):
        read(path)
    assert not mark.exists()


def storage_infos(metadata: Any) -> list[Any]:
    return list(metadata.storage_data.values())


def change_metadata(path: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)


def as_bytes(metadata: Any) -> None:
    metadata.state_dict_metadata["b"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()


ODD: dict[str, tuple[Callable[[Any], object], str]] = {
    "no tensor": (as_bytes, "b is not a tensor; refusing to unpickle it"),
    "outside": (
        lambda m: [setattr(i, "relative_path", "../state.json") for i in storage_infos(m)],
        r"'../state.json', no listed file",
    ),
    "too long": (lambda m: setattr(storage_infos(m)[0], "length", 1 << 40), "beyond the end"),
    "before the start": (lambda m: setattr(storage_infos(m)[0], "offset", -1), "a count is expected"),
    "transformed": (lambda m: setattr(storage_infos(m)[0], "transform_descriptors", ["x"]), "transformed"),
    "a lost part": (
        lambda m: m.state_dict_metadata["a"].chunks.clear(),
        r"a: its parts do not make up \[2, 3\]",
    ),
    "a part nowhere": (lambda m: m.storage_data.clear(), "is nowhere"),
    "another class": (lambda m: setattr(m, "storage_data", [1]), "a mapping of tensors is expected"),
    "no dtype": (
        lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", "x"),
        "a dtype is expected",
    ),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD.keys())
def test_metadata_that_do_not_fit_are_refused_in_words(change: Any, message: str, path: Path) -> None:
    change_metadata(path, change)
    with pytest.raises(store.BadCheckpoint, match=message):
        store.describe(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"garbage", pickle.dumps([1])])
def test_metadata_that_are_none_are_refused_in_words(content: bytes, path: Path) -> None:
    (path / ".metadata").write_bytes(content)
    sign(path)
    with pytest.raises(store.BadCheckpoint, match=r"\.metadata"):
        store.describe(path)


def test_a_checkpoint_that_is_removed_leaves_no_part_under_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda p: None)  # as if interrupted
    store.remove(path)
    assert store.published(path.parent) == [] and not path.exists()


def test_weights_are_named_before_what_an_optimizer_keeps() -> None:
    stored = {
        f"m.{name}": (2,) for name in ("adam.w.exp_avg", "average.w.value", "muon.w.momentum", "w", "z.adam")
    }
    with pytest.raises(manifest.BadCheckpoint, match=r"it has 5 others, first m\.w, m\.z\.adam, m\.adam\.w"):
        store.check_fits("x", stored, {"m.y": (2,)})
