"""Hostile samples are left out alike on any number of ranks, in any order of them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.cli import main
from parallel import checkpoint as store
from tests.mm.harness import free_port, run_rank, small
from tests.mm.plan.test_select import picture, sample
from tests.mm.shards import write_shard

pytestmark = pytest.mark.slow
LAYOUTS = (
    {},
    {"llm": {"tp": 2, "ranks": [1, 0]}},
    {"llm": {"ranks": [3, 1, 0, 2], "tp": 2}, "eye": {"ranks": [2, 0]}},
)


def raw(key: str, payload: bytes) -> dict[str, Any]:
    return {"key": key, "parts": {"json": payload}}


def hostile() -> list[dict[str, Any]]:
    """What the index sets apart: odd jsons, pictures that are none, or far too large, and ones cut off."""
    bomb = bytearray(picture(8, 8))
    at = bomb.index(b"IHDR") + 4
    bomb[at : at + 8] = (12_000).to_bytes(4, "big") * 2
    found = [sample(f"m{k}", "ab", (8, 8)) for k in range(4)]
    for one, payload in zip(found, (bytes(bomb), picture(8, 8)[:40], b"", b"GIF89a"), strict=True):
        one["parts"] = {"i0.png": payload}
    odd = (
        b"null",
        b"[" * 100_000,
        b'{"segments": 5}',
        b"\xff{}",
        b'{"segments": [{"eye": "i9.png"}]}',
        b"NaN",
    )
    return [*found, *(raw(f"j{k}", payload) for k, payload in enumerate(odd))]


def written(folder: Path) -> Path:
    """A shard whose hostile samples lie between others, some of which change after the index was made."""
    fine = [sample(f"f{k:02d}", "abcd"[: k % 3 + 2], (8, 8)) for k in range(40)]
    for k, one in enumerate(fine):  # of equal pictures a rank reads one
        one["parts"] = {"i0.png": picture(8, 8, grey=k)}
    mixed = [*fine, *hostile()]
    random.Random(3).shuffle(mixed)
    for one in mixed:
        for segment in one.get("segments", ()):
            if "vision" in segment:
                segment["eye"] = segment.pop("vision")
    shard = write_shard(folder / "a-0.tar", mixed)
    assert main(["data", "index", str(shard)]) == 0
    tar, times = bytearray(shard.read_bytes()), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    for name in (b"f03.json", b"f17.i0.png", b"f31.json"):
        tar[tar.index(name) + 512 + 20] ^= 1  # in its payload
    shard.write_bytes(bytes(tar))
    os.utime(shard, ns=times)  # without a trace: found when it is read
    return shard


def left_out(ranks: Any, folder: Path, shard: Path, world: int, layout: dict[str, Any]) -> dict[str, Any]:
    """What a job of four steps leaves of the samples that it could not use."""
    config = small(
        data={"train": [str(shard)], "context": 20, "max_skipped": 0.9},
        train={"steps": 4, "global_batch": 12},
        run={"dir": str(folder / str(world)), "nproc": world},
        checkpoint={"every": 4},
        layout=layout,
        eval={"samples": 1},
    )
    config["model"] = {"eye": config["model"]["vision"], "llm": config["model"]["llm"]}
    path = folder / f"{world}.yaml"
    path.write_text(yaml.safe_dump(config))
    ended = ranks(world, run_rank, ["train", str(path)], free_port(), timeout=200)
    assert [e.code for e in ended] == [0] * world, "".join(e.err for e in ended)
    run = folder / str(world)
    state = store.read_state(store.published(run)[-1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "skipped": [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()],
        "items": [line["skipped_items"] for line in lines if "skipped_items" in line],
        "state": [state[name] for name in ("bad_samples", "drawn", "data")],
    }


def test_hostile_samples_are_left_out_alike_on_any_number_of_ranks(ranks: Any, tmp_path: Path) -> None:
    shard = written(tmp_path)
    one, *others = (left_out(ranks, tmp_path, shard, 2**n, layout) for n, layout in enumerate(LAYOUTS))
    assert {s["key"] for s in one["skipped"]} >= {s["key"] for s in hostile()}
    late = {s["key"] for s in one["skipped"] if s["step"]}
    assert late == {"f03", "f17", "f31"} and len(one["state"][0]) == len(late)
    for other in others:
        assert other["skipped"] == one["skipped"]
        assert other == one
