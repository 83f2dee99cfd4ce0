"""Convert: plan which records go into which shard, make those that are not there, say what came of it."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.data.convert.inputs import input_files
from mm.data.convert.records import kind_of_file
from mm.data.convert.samples import layout_like
from mm.data.convert.shards import NOTES, Note, Shard, Span, finished, make_shard
from mm.data.layouts.energon import layout_of_shard
from mm.data.layouts.find import AUTO, NAMES, layout_name
from mm.errors import DataError, Refused

PLAN = "convert.json"
BAD = "bad.jsonl"
LOOKED_AT = 100  # records of a file that tell its layout
VERSION = 1


@dataclass(frozen=True)
class Request:
    """What is asked for.

    inputs: files, patterns or folders. out: the folder to write to. layout: as a config has it. shard_size:
    records a shard. media: folders that paths are found in, before the folder of their file. split: of an
    Energon folder.
    """

    inputs: tuple[str, ...]
    out: Path
    layout: Any = None
    shard_size: int = 1000
    media: tuple[str, ...] = ()
    split: str | None = None


def convert(request: Request, workers: int, say: Callable[[str], object] = print) -> dict[str, int]:
    """Make the shards of a request; those that are there whole are not made again.

    workers: processes. say: is given lines of progress. Returns counts of samples, bad, missing and shards.
    Raises Refused where the folder has something else, DataError where an input cannot be read or no sample
    is good.
    """
    if request.shard_size < 1 or workers < 1:
        raise Refused(f"--shard-size {request.shard_size}, --workers {workers}; needed: at least 1")
    try:
        layout = layout_name(request.layout)
    except ValueError as error:
        raise Refused(str(error)) from error
    files = input_files(request.inputs, request.split)
    plan = _plan(request, layout, files)
    _claim(request.out, plan)
    with _locked(request.out):
        spans = _spans(files, plan["layouts"], plan["counts"])
        shards = list(_shards(request, spans))
        notes = {shard.number: note for shard in shards if (note := finished(shard)) is not None}
        if notes:
            say(f"{len(notes)} of {len(shards)} shards are there already")
        _make([s for s in shards if s.number not in notes], notes, len(shards), workers, say)
        return _conclude(request.out, [notes[s.number] for s in shards])


def _plan(request: Request, layout: str, files: Sequence[Path]) -> dict[str, Any]:
    """What the shards are a function of, as JSON."""
    counts = [kind_of_file(file).count(file) for file in files]
    stats = [file.stat() for file in files]
    return {
        "version": VERSION,
        "inputs": [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)],
        "layout": layout,
        "layouts": [_layout(file, layout) for file in files],
        "counts": counts,
        "shard_size": request.shard_size,
        "media": list(request.media),
    }


def _layout(file: Path, layout: str) -> str:
    """The layout of a file's records: the one that is asked for, or what most of the first look like."""
    if layout == AUTO:
        layout = layout_of_shard(layout, file)
    if layout != AUTO:
        return layout
    records = list(kind_of_file(file).read(file, 0, min(LOOKED_AT, kind_of_file(file).count(file))))
    found = Counter(like for record in records if (like := layout_like(record)) is not None)
    if found:
        return found.most_common(1)[0][0]
    first = records[0].value if records else None
    have = ", ".join(map(str, first)) if isinstance(first, dict) else f"{first!r}"
    raise DataError(
        f"the samples of {file} are in no layout that is known ({', '.join(NAMES[1:])}): the first has "
        f"{have:.200}. Needed: --layout with a mapping of its fields, or module:function (docs/data.md)"
    )


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Make a folder this plan's, or find that it is. Raises Refused where it is another's."""
    file = out / PLAN
    if file.is_file():
        try:
            there = json.loads(file.read_text())
        except ValueError as error:
            raise Refused(f"{file} cannot be read: {error}; needed: another --out") from error
        differ = [k for k in plan if there.get(k) != plan[k]]
        if differ:
            why = ", ".join(_difference(k, there, plan) for k in differ)
            raise Refused(
                f"{out} has shards of another conversion: {why}; needed: another --out, or the same inputs "
                "and options"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        some = ", ".join(sorted(p.name for p in out.iterdir())[:3])
        raise Refused(f"{out} is not empty (it has {some}); needed: an --out that is new or empty")
    (out / NOTES).mkdir(parents=True, exist_ok=True)
    partial = out / f".{PLAN}.tmp"
    partial.write_text(json.dumps(plan, indent=1, ensure_ascii=False))
    os.replace(partial, file)


def _difference(key: str, there: dict[str, Any], plan: dict[str, Any]) -> str:
    if key != "inputs":
        return f"{key} {there.get(key)!r:.60}, now {plan[key]!r:.60}"
    old, new = ({one[0]: one[1:] for one in x.get("inputs", [])} for x in (there, plan))
    changed = [f for f in new if old.get(f) != new[f]] + [f for f in old if f not in new]
    return f"inputs, {', '.join(changed[:3])} among them" if changed else "inputs in another order"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Alone in a folder; what others have left unfinished in it is removed. Raises Refused."""
    (out / NOTES).mkdir(exist_ok=True)
    with (out / NOTES / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"another process is converting into {out}; needed: that it ends first") from error
        for left in (*out.glob(".*.tmp"), *(out / NOTES).glob(".*.tmp")):
            left.unlink(missing_ok=True)
        yield


def _spans(files: Sequence[Path], layouts: Sequence[str], counts: Sequence[int]) -> list[Span]:
    return [
        Span(file=str(f), start=0, stop=n, layout=layout)
        for f, layout, n in zip(files, layouts, counts, strict=True)
    ]


def _shards(request: Request, spans: Sequence[Span]) -> Iterator[Shard]:
    """All shards: records in order, shard_size in each but the last. O(shards + files)."""
    name, number, first = request.out.resolve().name, 0, 0
    own: list[Span] = []
    room = request.shard_size
    for span in spans:
        at = span["start"]
        while at < span["stop"]:
            stop = min(span["stop"], at + room)
            own.append({**span, "start": at, "stop": stop})
            room, at = room - (stop - at), stop
            if not room:
                yield Shard(number, request.out, name, tuple(own), first, request.media)
                number, first = number + 1, first + request.shard_size
                own, room = [], request.shard_size
    if own:
        yield Shard(number, request.out, name, tuple(own), first, request.media)


def _make(
    todo: Sequence[Shard], notes: dict[int, Note], total: int, workers: int, say: Callable[[str], object]
) -> None:
    """Make shards in processes and put their notes into `notes`. Raises DataError."""
    start, made, bad = time.monotonic(), 0, sum(len(note["bad"]) for note in notes.values())
    records = sum(map(_size, todo))

    def done(shard: Shard, note: Note) -> None:
        nonlocal made, bad
        notes[shard.number] = note
        made, bad = made + _size(shard), bad + len(note["bad"])
        rate = made / max(time.monotonic() - start, 1e-6)
        left = (records - made) / max(rate, 1e-6)
        say(f"{len(notes)} of {total} shards, {bad} bad, {rate:.0f} records/s, {left:.0f} s left")

    if workers == 1 or len(todo) < 2:
        for shard in todo:
            done(shard, make_shard(shard))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=spawn) as pool:
        futures = {pool.submit(make_shard, shard): shard for shard in todo}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size(shard: Shard) -> int:
    return sum(span["stop"] - span["start"] for span in shard.spans)


def _conclude(out: Path, notes: Sequence[Note]) -> dict[str, int]:
    """Write the list of all records that are left out; returns the counts. Raises DataError."""
    bad = [one for note in notes for one in note["bad"]]
    partial = out / f".{BAD}.tmp"
    partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in bad))
    os.replace(partial, out / BAD)
    counts = {
        "samples": sum(n["samples"] for n in notes),
        "bad": len(bad),
        "missing": sum(n["missing"] for n in notes),
        "shards": sum(n["samples"] > 0 for n in notes),
    }
    if not counts["samples"]:
        why = "; ".join(f"{one['where']}: {one['why']}" for one in bad[:3]) or "there are no records"
        raise DataError(f"no sample could be made, all are in {out / BAD}: {why}")
    return counts
