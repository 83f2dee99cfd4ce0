"""The index of a large data set: how fast it opens, what it takes of memory, what a step costs.

    python -m benchmarks.data.index [--samples 10000000] [--shards 20000] [--ranks 4] [--keep FOLDER]

Makes an index of shards that have no payload: a text of 20 to 20,000 bytes (lognormal), up to 2 pictures and
up to 1 clip a sample, 1,000 sizes. Then, in processes of their own, once for a small data set of 10 thousand
samples and once for all:

first: the first opening, which looks at all samples and keeps what does not fit. open: a later one, to the
table of samples. step: the median of 100 steps of 256 samples that are planned, with their digests. resident:
what the process has more after the opening and 100 steps than before. shared: as pages of the index's files,
which all ranks map. private: its own. pss: the sum over the ranks of what is more, shared pages divided.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.planning.synthetic import inputs
from mm.config.data import DataConfig
from mm.data.columns.entries import INDEX
from mm.data.columns.store import Store
from mm.data.columns.table import NO_CODE, Strings, Table
from mm.data.index import load_index
from mm.order.stream import Stream
from mm.plan.select import select
from mm.plan.step_plan import plan_table
from mm.plan.table import DataTable
from parallel.sequence.intervals import before

SMALL = 10_000  # samples
A_SHARD = 500  # samples
STEPS, BATCH = 100, 256
MODULES = ("vision", "audio")
SIZES = 1000  # rows of an item: as many metadata are distinct for each module
SHARD_BYTES = 1024
NAMES = ["segments", "auto", "json", "img0.png", "aud0.wav", *MODULES]


def synthetic(samples: int, shards: int, seed: int = 0) -> Table:
    """An index of shards that nobody has scanned, of equal numbers of samples."""
    rng = np.random.default_rng(seed)
    each = samples // shards
    of = rng.integers(0, 4, each * shards)  # items of a sample: none, a picture, two, a picture and a clip
    parts = 1 + np.asarray([0, 1, 2, 2])[of]  # as many as segments
    columns: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in INDEX.columns.items()}
    columns |= _samples(parts, each) | _items(of, parts, rng)
    columns["shards"] = np.zeros(shards, INDEX.columns["shards"])
    columns["shards"]["layout"], columns["shards"]["bytes"] = NAMES.index("auto"), SHARD_BYTES
    columns["shards"]["sum"][:, :8] = np.arange(shards)[:, None] // 256 ** np.arange(8) % 256
    paths = "".join(f"s-{k:06d}.tar" for k in range(shards)).encode()
    columns["path"] = np.frombuffer(paths, dtype=np.uint8)
    rows = {"shards": 1, "path": 12, "notes": 0, "samples": each, "lines": each, "keys": 8 * each}
    sizes = {name: np.full(shards, n) for name, n in rows.items()}
    sizes["parts"] = sizes["segments"] = parts.reshape(shards, each).sum(axis=1)
    first = {c: np.concatenate([[0], np.cumsum(size)]).astype(np.int64) for c, size in sizes.items()}
    metas = ["{}", *(json.dumps({"rows": k + 1}) for k in range(SIZES))]
    coded = {"names": NAMES, "probes": ["{}"], "metas": metas}
    strings = {name: Strings.of([s.encode() for s in own]) for name, own in coded.items()}
    return Table(INDEX, columns, first, strings)


def _samples(parts: np.ndarray, each: int) -> dict[str, np.ndarray]:
    """Samples with these numbers of parts, `each` a shard; their keys are numbers of eight digits."""
    n = len(parts)
    start = before(parts)
    first = start - start[::each].repeat(each)
    local = np.tile(np.arange(each), n // each)
    sample, line = (np.zeros(n, INDEX.columns[c]) for c in ("samples", "lines"))
    sample["key"], sample["key_bytes"], sample["part"], sample["parts"] = 8 * local, 8, first, parts
    line["sample"], line["segment"], line["segments"] = local, first, parts
    keys = (np.arange(n)[:, None] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")).astype(np.uint8)
    return {"samples": sample, "lines": line, "keys": keys.reshape(-1)}


def _items(of: np.ndarray, parts: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parts and segments, a json and a text first."""
    owner = np.repeat(np.arange(len(of)), parts)
    total = len(owner)
    nth = np.arange(total) - before(parts)[owner]
    text, clip = nth == 0, (of[owner] == 3) & (nth == 2)
    part, seg = (np.zeros(total, INDEX.columns[c]) for c in ("parts", "segments"))
    part["offset"], part["size"], part["known"] = 512 + 4096 * np.arange(total) % 2**30, 3000, True
    part["sha256"] = rng.integers(0, 256, (total, 32), dtype=np.uint8)
    names = [NAMES.index(n) for n in ("json", "aud0.wav", "img0.png")]
    part["name"] = np.where(text, names[0], np.where(clip, *names[1:]))
    part["meta"] = np.where(text, 0, 1 + rng.integers(0, SIZES, total))
    kinds = [NAMES.index(n) for n in ("audio", "vision")]
    seg["kind"], seg["part"] = np.where(text, NO_CODE, np.where(clip, *kinds)), nth
    length = np.clip(rng.lognormal(5.5, 1.2, total), 20, 20_000)
    seg["tokens"], seg["depends"], seg["loss"] = np.where(text, length, 0), NO_CODE, True
    return {"parts": part, "segments": seg}


def write(folder: Path, samples: int, shards: int) -> None:
    """Write the index, and shards of zeros whose times it has."""
    folder.mkdir(parents=True, exist_ok=True)
    table = synthetic(samples, shards)
    for k, path in enumerate(table.paths):
        with (folder / path).open("wb") as file:
            file.truncate(SHARD_BYTES)
        table.columns["shards"]["stamp"][k] = (folder / path).stat().st_mtime_ns
    assert Store(folder, INDEX, "index").add(table)


def resident() -> Mapping[str, float]:
    """Of this process, in MB: resident pages, those shared with files, its own, and its share of all."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, n, *_ = line.split()
        found[name.rstrip(":")] = int(n) / 1024
    own = found["Anonymous"]
    return {"resident": found["Rss"], "shared": found["Rss"] - own, "private": own, "pss": found["Pss"]}


def rank(folder: Path, barrier: Barrier | None, results: Any) -> None:
    """Open the data set, plan steps, and tell what that has cost."""
    made = replace(inputs(64, 4), context=8192)
    rules = DataConfig(train=["any"], overlong="skip", max_skipped=1.0)
    before = resident()
    begin = time.perf_counter()
    index = select(load_index(["s-*.tar"], folder), made, rules)
    table = DataTable.of(index, made)
    opened = time.perf_counter() - begin
    stream, bad = Stream.whole(1, len(table)), np.asarray(sorted(index.skipped), dtype=np.int64)
    times = []
    for step in range(STEPS):
        begin = time.perf_counter()
        positions = step * BATCH + np.arange(BATCH)
        ids, source = stream.at(positions)
        plan = plan_table(step, table.take(stream.mended(positions, ids, source, bad)), made)
        _ = plan.digest
        times.append(time.perf_counter() - begin)
    if barrier is not None:
        barrier.wait()  # shared pages count as such while all ranks have them
    after = resident()
    if barrier is not None:
        barrier.wait()
    results.put(
        {"open": opened, "step": float(np.median(times)), **{k: after[k] - before[k] for k in before}}
    )


def ranks(folder: Path, count: int) -> list[Mapping[str, float]]:
    """rank() in several processes at once."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.SimpleQueue(), context.Barrier(count)
    started = [context.Process(target=rank, args=(folder, barrier, results)) for _ in range(count)]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=4, help="processes at once")
    parser.add_argument("--keep", type=Path, help="make the index here and leave it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as root:
        steps = []
        for samples, shards in ((SMALL, SMALL // A_SHARD), (args.samples, args.shards)):
            folder = Path(root) / f"{samples}"
            if not folder.exists():
                write(folder, samples, shards)
            size = sum(p.stat().st_size for p in folder.glob("shards-*.index")) / 1e6
            first, one = ranks(folder, 1)[0], ranks(folder, 1)[0]
            many = ranks(folder, args.ranks)
            steps.append(one["step"])
            print(f"{samples:,} samples in {shards:,} shards, index {size:.0f} MB")
            print(f"  first {first['open']:.2f} s, open {one['open']:.2f} s, step {one['step'] * 1e3:.2f} ms")
            for name, own in (("one rank", one), (f"of {args.ranks} ranks, the most", _most(many))):
                said = ", ".join(f"{k} {own[k]:.0f} MB" for k in ("resident", "shared", "private"))
                print(f"  {name}: {said}")
            print(f"  pss of {args.ranks} ranks: {sum(m['pss'] for m in many):.0f} MB", flush=True)
        print(f"step, large over small: {steps[1] / steps[0]:.2f}")


def _most(found: list[Mapping[str, float]]) -> Mapping[str, float]:
    return max(found, key=lambda own: own["resident"])


if __name__ == "__main__":
    sys.exit(main())
