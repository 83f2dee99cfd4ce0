"""Which samples of a data set do not fit a model, and how many do: worked out once, kept beside the indexes.

What is kept holds for these shards, lengths, encoders with their options and sources, and this context. It is
kept of large data sets only: a small one is measured in less time than a file takes to look up.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import encoders
from mm.data.columns.file import write_file
from mm.data.columns.store import writing
from mm.data.sample import Tally
from mm.data.storage import LOCAL, Storage, tell
from mm.plan.fitted import Fitted
from mm.plan.portions import Portions
from parallel.sequence.intervals import Column

VERSION = 2
SHORTENED = ("truncate", "split")  # of data.overlong, what makes portions
PORTIONS = ("sample", "first", "start", "stop")  # columns of Portions
LARGE = 100_000  # samples
MOST_KEPT = 8  # files in a folder
PROBED = (1, 2, 7, 64, 1000)  # rows by which resamplers are told from each other


class Measured(NamedTuple):
    """Samples that do not fit, ascending. misfit: with an item that an encoder cannot take. overlong: longer
    than data.context, and length: theirs. portions: of those that are truncated or split. tally: of the
    samples that fit, and of portions."""

    misfit: Column
    overlong: Column
    length: Column
    portions: Portions
    tally: Tally | None = None


def measured(
    fitted: Fitted, overlong: str, make: Callable[[], Measured], storage: Storage = LOCAL
) -> Measured:
    """What is kept for these samples, else what make() finds, which is kept then. overlong: data.overlong.
    storage: reads the shards."""
    key = _key(fitted, overlong) if len(fitted) >= LARGE else None
    if key is None:
        return make()
    path = storage.folder_of(fitted.base.shards[0].path) / f"shards-{key[:12]}.selection"
    found = _read(path, key, overlong)
    if found is not None:
        return found
    with writing(path.parent, tell):
        found = _read(path, key, overlong)  # another process may have made it meanwhile
        if found is None:
            found = make()
            older = sorted(path.parent.glob("shards-*.selection"), key=lambda p: p.stat().st_mtime)
            if write_file(path, [_content(found, key)]):
                for one in older[: 1 - MOST_KEPT]:
                    one.unlink(missing_ok=True)
    return found


def _content(found: Measured, key: str) -> bytes:
    buffer = io.BytesIO()
    tally = found.tally
    assert tally is not None
    items = {f"items {m}": count for m, count in tally.items.items()}
    portions = {f"portions {name}": getattr(found.portions, name) for name in PORTIONS}
    columns = {**found._asdict(), **tally._asdict(), **items, **portions}
    arrays = {name: c for name, c in columns.items() if isinstance(c, np.ndarray)}
    np.savez(buffer, allow_pickle=False, key=np.frombuffer(key.encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def _read(path: Path, key: str, overlong: str) -> Measured | None:
    try:
        with np.load(path, allow_pickle=False) as found:
            if found["key"].tobytes() != key.encode():
                return None
            items = {n.removeprefix("items "): found[n] for n in found.files if n.startswith("items ")}
            samples, truncated, split, portions = (found[name] for name in Tally._fields[:4])
            tally = Tally(samples, truncated, split, portions, items)
            sample, first, start, stop = (found[f"portions {name}"] for name in PORTIONS)
            portions = Portions(sample, first, start, stop, overlong == "split")
            return Measured(found["misfit"], found["overlong"], found["length"], portions, tally)
    except Exception:  # whatever a damaged file leads to
        return None


def _key(fitted: Fitted, overlong: str) -> str | None:
    """A sum of all that the measure depends on; None where an option has no text that stays the same."""
    digest = hashlib.sha256()
    inputs = fitted.inputs
    for shard in fitted.base.shards:
        (table, n), (texts, m) = shard.table, shard.texts
        first = texts.first["lines"]
        digest.update(
            table.columns["shards"]["sum"][n].tobytes() + bytes(texts.header.get("tokenizer", ""), "utf-8")
        )
        digest.update(int(first[m + 1] - first[m]).to_bytes(8, "little"))
    shortened = overlong if overlong in SHORTENED else ""
    said: list[Any] = [VERSION, inputs.context, inputs.limits, fitted.encode is not None, shortened]
    for module, use in inputs.encoders.items():
        resampled = None if use.resample is None else [use.resample(n) for n in PROBED]
        said += [module, use.cls.__module__, use.cls.__qualname__, use.cfg, resampled]
        for one in use.cls.__mro__:
            file = getattr(sys.modules.get(one.__module__), "__file__", None)
            if file is not None and inspect.isclass(one):
                digest.update(Path(file).read_bytes())
    for folder in (Path(encoders.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    text = repr(said)
    if " at 0x" in text:
        return None
    digest.update(text.encode())
    return digest.hexdigest()
