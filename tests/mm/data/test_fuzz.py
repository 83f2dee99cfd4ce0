"""Random damage to shards, media and index files: no error but DataError, and no other sample is touched.

A seed that fails is named, and makes the same damage again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.config.schema import from_mapping
from mm.data.encode import encode_samples, parse_sample
from mm.data.reader import BadSample, ShardReader
from mm.data.sample import Index
from mm.data.tar import BLOCK
from mm.data.tokenizer import Tokenizer
from mm.errors import DataError
from mm.plan.blueprint import Blueprint, draw_up
from mm.ranks.job import open_index
from tests.encoders.helpers import png, wav
from tests.encoders.media.made import by_av, by_soundfile, film, noise, shades
from tests.encoders.test_video import video
from tests.mm.harness import small

QUICK, ALL = 20, 500
PACKAGES = all(importlib.util.find_spec(name) for name in ("av", "soundfile"))


@cache
def shard() -> tuple[bytes, dict[str, list[tuple[int, int]]]]:
    """A tar of samples with every kind of payload, and by key which bytes of it are that sample's."""
    jpeg, webp = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(png(20, 16, 1, "RGB"))).save(jpeg, "JPEG")
    frames = [Image.fromarray(a) for a in shades(3, 16, 16)]
    frames[0].save(webp, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    media = {"vision": {"a.png": png(16, 24, 0, "RGB"), "b.jpg": jpeg.getvalue(), "c.webp": webp.getvalue()}}
    media["vision"] |= {"d.tar": video(2, (16, 16))}
    media["audio"] = {"e.wav": wav(2000, 16000, 2)}
    if PACKAGES:
        media["vision"] |= {"f.mp4": film(shades(5, 16, 16), g="4")}
        media["audio"] |= {"g.flac": by_soundfile(noise(1200), 8000, "FLAC", "PCM_16")}
        media["audio"] |= {"h.ogg": by_soundfile(noise(1200), 8000, "OGG", "VORBIS")}
        media["audio"] |= {"i.mp3": by_av(noise(1200), 16000, "mp3", "libmp3lame")}
    samples: list[dict[str, Any]] = [{"key": "text", "segments": [{"text": "alone"}], "parts": {}}]
    for module, parts in media.items():
        for name, payload in parts.items():
            said = [{module: name}, {"text": "is it", "depends": module}]
            samples.append({"key": f"k{name[0]}", "segments": said, "parts": {name: payload}})
    samples.append({"key": "last", "segments": [{"text": "of them"}], "parts": {}})
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        for sample in samples:
            said = json.dumps({"segments": sample["segments"]}).encode()
            for name, payload in {"json": said, **sample["parts"]}.items():
                info = tarfile.TarInfo(f"{sample['key']}.{name}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    where: dict[str, list[tuple[int, int]]] = {}
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
        for member in tar.getmembers():
            span = (member.offset, member.offset_data + member.size)
            where.setdefault(member.name.partition(".")[0], []).append(span)
    return out.getvalue(), where


@cache
def plan() -> Blueprint:
    raw = small(
        data={"train": ["a-*.tar"], "context": 4096, "misfit": "skip", "overlong": "skip", "max_skipped": 1.0}
    )
    options = {"patch": 4, "width": 48, "heads": 12, "layers": 2, "mlp": 24}
    options |= {"pictures": {"fit": "smart", "least": 64, "most": 1024}}
    raw["model"]["vision"] = {"encoder": "qwen3_vl", "projector": {"hidden": 24}, "options": options}
    sound = {"width": 24, "heads": 12, "layers": 2, "ffn": 48, "channels": 4}
    sound |= {"sound": {"mels": 16, "size": 512, "emphasis": 0.97}}
    raw["model"]["audio"] = {"encoder": "parakeet", "projector": {"hidden": 24}, "options": sound}
    return draw_up(from_mapping(raw, Path()), 1)


def opened(folder: Path) -> Index | None:
    """The index that a run has; None where it is refused in words."""
    made = plan()
    try:
        return open_index(made, made.cfg.data.train, folder)
    except DataError as error:
        assert len(str(error)) > 20
        return None


def read(index: Index) -> dict[str, str]:
    """By key, a fingerprint of what a step takes of each sample: tokens and inputs; "" where it is bad."""
    uses, reader, out = plan().inputs.encoders, ShardReader(), {}
    for sample in index.usable:
        h = hashlib.sha256()
        try:
            written = parse_sample(reader.read(sample, sample.json))
            h.update(repr(encode_samples([written], Tokenizer())[0]).encode())
            for seg in sample.segments:
                if seg.part is not None:
                    use, payload = uses[seg.kind], reader.read(sample, seg.part)
                    h.update(np.ascontiguousarray(use.cls.prepare(use.cfg, payload, seg.part.meta)).tobytes())
            out[sample.key] = h.hexdigest()
        except (BadSample, ValueError, OSError, EOFError):  # those that a run takes for a bad sample
            out[sample.key] = ""
    reader.close()
    return out


def damaged(rng: random.Random, tar: bytes) -> tuple[bytes, list[tuple[int, int]], bool]:
    """A damaged tar, which bytes are other ones, and whether all others are where they were."""
    at, n = rng.randrange(len(tar)), len(tar)
    kind = rng.choice(["flips", "flips", "zeros", "noise", "swap", "cut", "removed", "twice", "length"])
    out = bytearray(tar)
    if kind == "flips":
        places = [rng.randrange(n) for _ in range(rng.choice([1, 1, 3, 20]))]
        for place in places:
            out[place] ^= 1 << rng.randrange(8)
        return bytes(out), [(p, p + 1) for p in places], True
    if kind in ("zeros", "noise"):
        stop = min(n, at + rng.choice([1, 40, 512, 3000]))
        out[at:stop] = bytes(stop - at) if kind == "zeros" else rng.randbytes(stop - at)
        return bytes(out), [(at, stop)], True
    if kind == "swap":  # two stretches of equal length, such as payloads
        size = rng.choice([16, 512, 1024])
        a, b = sorted(rng.randrange(n - 2 * size) for _ in range(2))
        b = max(b, a + size)
        out[a : a + size], out[b : b + size] = tar[b : b + size], tar[a : a + size]
        return bytes(out), [(a, a + size), (b, b + size)], True
    if kind == "cut":
        return tar[:at], [(at, n)], True
    block = at // BLOCK * BLOCK
    size = rng.choice([1, 2, 7]) * (BLOCK if rng.random() < 0.7 else 100)
    if kind == "removed":
        return tar[:block] + tar[block + size :], [(block, block + size)], False
    if kind == "twice":
        return tar[: block + size] + tar[block:], [(block, block + size)], False
    spans = [span for spans in shard()[1].values() for span in spans]
    start, stop = rng.choice(spans)
    header = tarfile.TarInfo.frombuf(tar[start : start + BLOCK], "utf-8", "strict")
    header.size = rng.choice([0, 1, header.size + 1, header.size + 600, 10**6, 8**11 - 1])
    out[start : start + BLOCK] = header.tobuf(tarfile.USTAR_FORMAT)
    swallowed = start + 2 * BLOCK + header.size if header.size > stop - start - BLOCK else stop
    return bytes(out), [(start, swallowed)], True


def check_new(seed: int, folder: Path) -> None:
    """A damaged shard that nobody has indexed."""
    tar, where = shard()
    bad, changed, in_place = damaged(random.Random(seed), tar)
    hit = {key for key, spans in where.items() for a, b in spans for c, d in changed if a < d and c < b}
    (folder / "a-0.tar").write_bytes(bad)
    index = opened(folder)
    found = {} if index is None else read(index)
    for key, what in found.items():
        assert key in hit or what == pristine()[key] or not in_place, (seed, key)
    if in_place:
        assert pristine().keys() - hit <= found.keys(), seed
    if index is not None and pristine().keys() - found.keys():
        assert index.broken or index.torn or index.skipped or not in_place, seed


def check_index(seed: int, folder: Path) -> None:
    """A whole shard whose index files are damaged, whatever they are called: they are made again."""
    rng = random.Random(seed)
    (folder / "a-0.tar").write_bytes(shard()[0])
    assert opened(folder) is not None
    files = list(folder.glob("shards-*"))
    assert files
    for stored in files:
        content = bytearray(stored.read_bytes())
        for _ in range(rng.choice([1, 5])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        stored.write_bytes(bytes(content)[: rng.choice([None, None, len(content) // 2, 0])])
    again = opened(folder)
    assert again is not None and read(again) == pristine(), seed


def check_changed(seed: int, folder: Path) -> None:
    """A shard that is damaged after it was indexed, without another size or age: only reading can tell."""
    tar, where = shard()
    bad, changed, _ = damaged(random.Random(seed), tar)
    hit = {key for key, spans in where.items() for a, b in spans for c, d in changed if a < d and c < b}
    file = folder / "a-0.tar"
    file.write_bytes(tar)
    index, times = opened(folder), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(bad[: len(tar)].ljust(len(tar), b"\0"))
    os.utime(file, ns=times)
    for found in (index, opened(folder)):
        assert found is not None
        for key, what in read(found).items():
            moved = len(bad) != len(tar)
            assert what == pristine()[key] or (what == "" and (key in hit or moved)), (seed, key)


CHECKS: tuple[Callable[[int, Path], None], ...] = (check_new, check_index, check_changed)


@cache
def pristine() -> dict[str, str]:
    """read() of the whole shard."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a-0.tar").write_bytes(shard()[0])
        index = opened(Path(folder))
        assert index is not None and not index.broken and not index.skipped
        found = read(index)
    assert found.keys() == shard()[1].keys() and all(found.values())
    return found


def test_damage_touches_no_other_sample(tmp_path: Path) -> None:
    for seed in range(QUICK):
        (folder := tmp_path / str(seed)).mkdir()
        CHECKS[seed % 3](seed, folder)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, ALL, 48))
def test_damage_touches_no_other_sample_on_demand(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 48):
        for check in CHECKS:
            (folder := tmp_path / f"{seed}-{check.__name__}").mkdir()
            check(seed, folder)
            shutil.rmtree(folder)
