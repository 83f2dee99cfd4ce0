"""The index of a shard: where every payload lies, how long it is, and what must be known to plan with it.

A sample is `KEY.json` with its parts `KEY.img0.png`, `KEY.aud0.wav`, .. in a WebDataset tar. The json says
how they follow each other:

    {"segments": [{"vision": "img0.png"}, {"text": "sees "}, {"text": "3", "depends": "vision"}]}

A segment is text (optionally "loss": false, and "depends": the module that its tokens depend on), or an item
of a module. The index is made once a shard and kept beside it; text stays in the tar, its length is indexed.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from mm.errors import DataError

VERSION = 1


@dataclass(frozen=True)
class Part:
    """One payload: its shard, place and sha256, and its metadata (sizes; from a probe of its extension)."""

    shard: str
    name: str
    offset: int
    size: int
    sha256: str
    meta: Mapping[str, int]


@dataclass(frozen=True)
class Segment:
    """kind: "text" or a module. Text has text_bytes and no part, an item has a part and no text."""

    kind: str
    text_bytes: int
    part: Part | None
    loss: bool
    depends: str | None


@dataclass(frozen=True)
class Sample:
    """One training sequence; id counts over all shards of a data set in order."""

    id: int
    key: str
    shard: str
    segments: tuple[Segment, ...]
    json: Part

    def items(self, module: str) -> tuple[Part, ...]:
        """The sample's items of a module, in order."""
        return tuple(s.part for s in self.segments if s.part is not None and s.kind == module)


@dataclass(frozen=True)
class Index:
    """The samples of a data set, and those that could not even be indexed: (shard, key, why)."""

    samples: tuple[Sample, ...]
    broken: tuple[tuple[str, str, str], ...]

    @cached_property
    def digest(self) -> str:
        """A fingerprint of what the samples are, wherever their shards lie."""
        h = hashlib.sha256()
        for sample in self.samples:
            h.update(f"{sample.key} {sample.json.sha256}\n".encode())
        return h.hexdigest()[:16]


Probe = Callable[[bytes], dict[str, int]]


def _probe_image(payload: bytes) -> dict[str, int]:
    from PIL import Image

    from encoders.compat import picture_channels

    with Image.open(io.BytesIO(payload)) as image:
        return {"height": image.height, "width": image.width, "channels": picture_channels(image)}


def _probe_wav(payload: bytes) -> dict[str, int]:
    import wave

    with wave.open(io.BytesIO(payload)) as f:
        return {"samples": f.getnframes(), "rate": f.getframerate()}


def _probe_npy(payload: bytes) -> dict[str, int]:
    array = np.load(io.BytesIO(payload), allow_pickle=False)
    return {f"dim{i}": n for i, n in enumerate(array.shape)}


_probes: dict[str, Probe] = {
    "png": _probe_image,
    "jpg": _probe_image,
    "jpeg": _probe_image,
    "wav": _probe_wav,
    "npy": _probe_npy,
}


def register_probe(extension: str, probe: Probe) -> None:
    """Say how to read the metadata of payloads with a new extension (without dot)."""
    _probes[extension.lower()] = probe


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_name(shard.name + ".index.json")


def build_index(shard: Path) -> dict[str, Any]:
    """Read a shard once and return its index as JSON. A torn end is noted; what is whole is indexed."""
    parts: dict[str, dict[str, Any]] = {}
    broken: list[list[str]] = []
    last = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, _, name = member.name.partition(".")
                last = key
                handle = tar.extractfile(member)
                payload = handle.read() if handle is not None else b""
                if len(payload) < member.size:
                    raise tarfile.ReadError("payload ends before its size")
                parts.setdefault(key, {})[name] = _part_entry(member, name, payload)
        if not _ends_whole(shard):
            raise tarfile.ReadError("it has no end mark")
    except (tarfile.TarError, EOFError, OSError) as error:
        broken.append([last, f"the shard is torn: {error}"])
        parts.pop(last, None)
    samples = []
    for key, found in parts.items():
        try:
            samples.append({"key": key, "segments": _segments(found), "parts": found})
        except ValueError as error:
            broken.append([key, str(error)])
        for entry in found.values():
            entry.pop("payload", None)
    return {"version": VERSION, "bytes": shard.stat().st_size, "samples": samples, "broken": broken}


def _ends_whole(shard: Path) -> bool:
    """Whether a tar ends in blocks of zeros; one that is cut between two files looks fine otherwise."""
    with shard.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 512))
        return size % 512 == 0 and not any(f.read())


def _part_entry(member: tarfile.TarInfo, name: str, payload: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "offset": member.offset_data,
        "size": member.size,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "meta": {},
    }
    if name == "json":
        entry["payload"] = payload
    probe = _probes.get(name.rpartition(".")[2].lower())
    if probe is not None:
        try:
            entry["meta"] = probe(payload)
        except Exception as error:  # whatever a decoder raises, the part is unusable and named
            entry["unreadable"] = f"{name}: {error}"
    return entry


def _segments(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    if "json" not in parts:
        raise ValueError("it has no json part")
    out = []
    for seg in parse_segments(parts["json"]["payload"]):
        if seg.text is None:
            if seg.name not in parts:
                raise ValueError(f"its json names {seg.name!r}, which the shard does not hold")
            if "unreadable" in parts[seg.name]:
                raise ValueError(parts[seg.name]["unreadable"])
            out.append({"kind": seg.kind, "part": seg.name})
        else:
            entry: dict[str, Any] = {"kind": "text", "bytes": len(seg.text.encode())}
            if not seg.loss:
                entry["loss"] = False
            if seg.depends is not None:
                entry["depends"] = seg.depends
            out.append(entry)
    return out


@dataclass(frozen=True)
class WrittenSegment:
    """A segment as the json has it: text, or the name of a part of module `kind`."""

    kind: str
    text: str | None
    name: str
    loss: bool
    depends: str | None


def parse_segments(payload: bytes) -> list[WrittenSegment]:
    """The segments of a sample's json; ValueError says what is wrong with it."""
    try:
        written = json.loads(payload)["segments"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its json has no list of segments ({error})") from error
    out = []
    for i, seg in enumerate(written):
        kinds = list(seg) if isinstance(seg, dict) else []
        if len(kinds) > 1:  # a module of its own may be called loss or depends
            kinds = [k for k in kinds if k not in ("loss", "depends")]
        if len(kinds) != 1 or not isinstance(seg[kinds[0]], str):
            raise ValueError(f"segment {i} is {seg!r}; needed: one of text or a module, with a string")
        kind = kinds[0]
        is_text = kind == "text"
        loss, depends = bool(seg.get("loss", True)), seg.get("depends")
        out.append(
            WrittenSegment(kind, seg[kind] if is_text else None, "" if is_text else seg[kind], loss, depends)
        )
    return out


def read_or_build(shard: Path, *, write: bool = True) -> dict[str, Any]:
    """The index of a shard, made, and with `write` written beside it, where it is missing or of another
    file."""
    path = index_path(shard)
    if path.exists():
        try:
            index = json.loads(path.read_text())
            if index["version"] == VERSION and index["bytes"] == shard.stat().st_size:
                return index
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not an index that can be read: made anew below
    index = build_index(shard)
    if not write or not index["samples"]:
        return index  # perhaps not a shard at all: nothing is left beside it
    # Several ranks may do this at once; they write the same bytes, and the rename is atomic.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(index, separators=(",", ":")))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # a read-only data set still trains; it is indexed at each start
    return index


def find_shards(patterns: Sequence[str], base: Path) -> list[Path]:
    """Shards that globs and brace patterns (relative to base) name; DataError where one names none."""
    out: list[Path] = []
    for pattern in patterns:
        found = [
            Path(p) for one in braceexpand.braceexpand(pattern) for p in sorted(glob.glob(str(base / one)))
        ]
        if not found:
            folder = (base / pattern).parent
            have = sorted(p.name for p in folder.glob("*.tar")) if folder.is_dir() else None
            there = (
                "the folder does not exist" if have is None else f"it has {', '.join(have[:5]) or 'no tar'}"
            )
            raise DataError(f"no shard matches {pattern!r} in {folder}: {there}")
        out += found
    return out


def load_index(patterns: Sequence[str], base: Path, *, write: bool = True) -> Index:
    """The data set that the patterns name; write: keep the indices of its shards beside them.

    Raises DataError where there is no sample at all.
    """
    samples: list[Sample] = []
    broken: list[tuple[str, str, str]] = []
    for shard in find_shards(patterns, base):
        raw = read_or_build(shard, write=write)
        broken += [(str(shard), key, why) for key, why in raw["broken"]]
        for entry in raw["samples"]:
            parts = {
                name: Part(str(shard), name, p["offset"], p["size"], p["sha256"], p["meta"])
                for name, p in entry["parts"].items()
            }
            segments = tuple(
                Segment(
                    s["kind"],
                    s.get("bytes", 0),
                    parts[s["part"]] if "part" in s else None,
                    s.get("loss", True),
                    s.get("depends"),
                )
                for s in entry["segments"]
            )
            samples.append(Sample(len(samples), entry["key"], str(shard), segments, parts["json"]))
    if not samples:
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        raise DataError(f"no usable sample in {', '.join(patterns)}: {why or 'the shards are empty'}")
    return Index(tuple(samples), tuple(broken))
