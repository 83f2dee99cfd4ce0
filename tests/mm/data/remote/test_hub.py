"""Shards of a Hugging Face repository: huggingface_hub asks a server here that answers as the Hub does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.remote.cache import BLOCK, WAYS
from mm.data.remote.retry import Limits
from mm.data.remote.shards import RemoteShards
from mm.data.storage import Storage
from mm.errors import DataError
from tests.mm.data.remote.server import Answer, Answers, files, serving
from tests.pages import ROOT

NEEDED = [name for name in ("fsspec", "huggingface_hub") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(NEEDED), reason=f"{NEEDED} not installed: pip install -e '.[remote]'"),
]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = f"hf://datasets/people/pictures@{COMMIT}"
DATA = random.Random(0).randbytes(2 * BLOCK + 99)
LIMITS = Limits(timeout_s=20.0, attempts=4, pause_s=0.01)


def hub(data: Mapping[str, bytes]) -> Answers:
    """One data set of one commit, as huggingface.co answers for it: its API of trees, and files by redirects
    to another address, which sends ranges."""
    store = files({f"/cdn/{name}": payload for name, payload in data.items()})
    api, tree = f"/api/datasets/people/pictures/revision/{COMMIT}", "/api/datasets/people/pictures/tree/"
    resolve = f"/datasets/people/pictures/resolve/{COMMIT}/"

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        plain, kind = path.partition("?")[0], {"Content-Type": "application/json"}
        if plain == api:
            return 200, kind, json.dumps({"id": "people/pictures", "sha": COMMIT, "siblings": []}).encode()
        if plain.startswith(tree + COMMIT):
            folder = plain.removeprefix(tree + COMMIT).strip("/")
            found = [
                {"type": "file", "path": name, "size": len(own), "oid": hashlib.sha1(own).hexdigest()}
                for name, own in data.items()
                if name.rpartition("/")[0] == folder
            ]
            folders = {n.partition("/")[0] for n in data if "/" in n and not folder}
            found += [{"type": "directory", "path": n, "size": 0, "oid": "0"} for n in sorted(folders)]
            if found:
                return 200, kind, json.dumps(found).encode()
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        if plain.startswith(resolve) and plain.removeprefix(resolve) in data:
            return 302, {"Location": f"/cdn/{plain.removeprefix(resolve)}?signature=HIDDEN"}, b""
        if plain.startswith("/cdn/"):
            return store(method, path, headers, body)
        return 404, {"X-Error-Code": "RevisionNotFound" if "/revision/" in plain else "EntryNotFound"}, b"{}"

    return answer


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask a server, by fsspec's own configuration, as for a mirror."""
    from fsspec.config import conf
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    monkeypatch.setitem(conf, "hf", {"endpoint": url, "token": "hf_SECRET"})


def shards(folder: Path, said: list[str]) -> RemoteShards:
    return RemoteShards.of(folder, WAYS * (BLOCK + 64), limits=LIMITS, warn=said.append)


def test_patterns_ranges_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {f"train/s-{n}.tar": DATA[n:] for n in range(3)} | {"README.md": b"text", "train/note.txt": b"n"}
    with serving(hub(data)) as server:
        at(server.url, monkeypatch)
        said = list[str]()
        remote = shards(tmp_path, said)
        names = [f"{REPO}/train/s-{n}.tar" for n in range(3)]
        assert remote.find(f"{REPO}/train/*.tar") == names
        assert remote.find(f"{REPO}/train/s-{{2,0,7}}.tar") == [names[2], names[0]]
        server.asked.clear()
        wanted = [(names[0], BLOCK - 3, 9), (names[1], 5, 7), (names[2], len(DATA) - 9, 50)]
        expected = [DATA[BLOCK - 3 : BLOCK + 6], DATA[6:13], DATA[-7:]]
        assert remote.read_many(wanted) == expected
        asked = {path.partition("?")[0] for _, path, _ in server.asked}
        assert all(path.startswith(("/datasets/", "/cdn/")) for path in asked), "a read asks for nothing else"
        assert server.ranges(), "files are not read whole"
        assert all(
            h.get("authorization") == "Bearer hf_SECRET" for _, p, h in server.asked if "/resolve" in p
        )
        with remote.local(names[1]) as path:
            assert path.read_bytes() == DATA[1:]
        server.faults += ["", "503", "", "short"]
        assert shards(tmp_path / "other", said).read(names[0], 9, 2 * BLOCK) == DATA[9 : 9 + 2 * BLOCK]
        assert not server.faults
        with pytest.raises(FileNotFoundError, match=r"train/none\.tar"):
            remote.read(f"{REPO}/train/none.tar", 0, 5)
        other = REPO.replace("01234567", "76543210")
        with pytest.raises((OSError, DataError), match="76543210"):
            remote.read(f"{other}/train/s-0.tar", 0, 5)
        with pytest.raises(DataError, match="no revision"):
            remote.find("hf://datasets/people/pictures/train/*.tar")
        assert "SECRET" not in f"{said}" and "HIDDEN" not in f"{said}"


def test_samples_are_those_of_the_local_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = ROOT / "configs" / "data"
    data = {f"data/{file.name}": file.read_bytes() for file in local.glob("digits-train-*.tar")}
    with serving(hub(data)) as server:
        at(server.url, monkeypatch)
        storage = Storage(shards(tmp_path, []))
        index = load_index([f"{REPO}/data/digits-train-*.tar"], tmp_path, storage=storage)
        mine = load_index(["digits-train-*.tar"], local)
        assert len(index.samples) == len(mine.samples) == 860
        there, here = ShardReader(storage), ShardReader()
        for n in range(0, 860, 43):
            a, b = index.samples[n], mine.samples[n]
            assert a.key == b.key and there.read(a, a.json) == here.read(b, b.json)
            for module in ("vision", "audio"):
                for one, other in zip(a.items(module), b.items(module), strict=True):
                    assert there.read(a, one) == here.read(b, other)
        there.close(), here.close()
        assert server.ranges()
