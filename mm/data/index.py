"""The index of a data set: its samples as columns, with the offset of every payload.

Text stays in the shards; the index has only its length, in bytes, or in tokens of a published tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import braceexpand

from mm.data.building import Kept, kept_indexes, tell
from mm.data.columns.entries import notes_of
from mm.data.columns.samples import Samples, Shard
from mm.data.columns.store import Say
from mm.data.convert.records import kind_name
from mm.data.encode import NO_TEMPLATE
from mm.data.layouts.find import Spec, layout_name
from mm.data.probes import register_probe as register_probe  # documented here for users
from mm.data.published import PublishedTokenizer
from mm.data.sample import Broken, Index
from mm.data.sources import source_names
from mm.data.storage import find
from mm.data.tokenizer import AnyTokenizer
from mm.data.tokens import kept_texts
from mm.errors import DataError

CONVERTS = "; python -m mm data convert IN --out DIR makes shards of other files and folders (docs/data.md)"


def named_layout(spec: Spec) -> str:
    """layout_name() of what a config or an option says; raises DataError."""
    try:
        return layout_name(spec)
    except ValueError as error:
        raise DataError(str(error)) from error


def find_shards(patterns: Sequence[str], base: Path, made_by: str | None = None) -> list[Path]:
    """The shards that globs and brace patterns (relative to base) match.

    made_by: the command that makes them, for the error. Raises DataError where a pattern matches nothing, or
    files that data convert would read.
    """
    out: list[Path] = []
    for pattern in patterns:
        found = [Path(p) for one in braceexpand.braceexpand(pattern) for p in find(str(base / one))]
        if not found:
            folder = (base / pattern).parent
            have = sorted(p.name for p in folder.glob("*.tar")) if folder.is_dir() else None
            there = (
                "the folder does not exist" if have is None else f"it has {', '.join(have[:5]) or 'no tar'}"
            )
            hint = CONVERTS if have == [] else ""
            hint = hint if made_by is None else f"; this makes it: {made_by}"
            raise DataError(f"no shard matches {pattern!r} in {folder}: {there}{hint}")
        other = next((path for path in found if kind_name(path) not in (None, ".tar")), None)
        if other is not None:
            raise DataError(f"{other} is no tar; needed: shards{CONVERTS}")
        out += found
    return out


def load_index(
    patterns: Sequence[str],
    base: Path,
    *,
    layout: Spec | list[Spec] = None,
    tokenizer: AnyTokenizer | None = None,
    made_by: str | None = None,
    write: bool = True,
    say: Say = tell,
    names: Callable[[Sequence[str]], Sequence[str]] = source_names,
) -> Index:
    """The data set of the shards that the patterns match.

    layout: how samples are written (mm/data/layouts), in a list by pattern; None: what each shard looks like.
    tokenizer: in whose tokens lengths are; None: bytes. write: keep new index files beside the shards. say:
    hears what takes long. made_by: as in find_shards. names: of the data sets that shards are of, by shard.
    Raises DataError where a pattern matches nothing, a shard is compressed, there is no such layout, or no
    sample is usable.
    """
    layouts = [
        named_layout(one) for one in (layout if isinstance(layout, list) else [layout] * len(patterns))
    ]
    given = [
        (str(path), own)
        for pattern, own in zip(patterns, layouts, strict=True)
        for path in find_shards([pattern], base, made_by)
    ]
    paths = [path for path, _ in given]
    kept: dict[tuple[str, str], Kept] = {}
    for one in dict.fromkeys(layouts):
        mine = [path for path, own in given if own == one]
        kept |= {
            (path, one): k
            for path, k in zip(mine, kept_indexes(mine, one, write=write, say=say), strict=True)
        }
    indexes = [kept[both] for both in given]
    texts = indexes
    if isinstance(tokenizer, PublishedTokenizer):
        texts = kept_texts(paths, indexes, tokenizer, write=write, say=say)
    both = list(zip(paths, names(paths), indexes, texts, strict=True))
    samples = Samples([Shard(path, source, index, text) for path, source, index, text in both])
    broken = [b for path, _, index, text in both for b in _broken(path, index, text)]
    if not len(samples):
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        raise DataError(f"no usable sample in {', '.join(patterns)}: {why or 'the shards are empty'}")
    facts = [index.table.columns["shards"][index.shard] for index in indexes]
    return Index(
        samples,
        tuple(broken),
        shards=tuple(paths),
        torn=tuple(p for p, own in zip(paths, facts, strict=True) if own["torn"]),
        ignored={p: int(own["ignored"]) for p, own in zip(paths, facts, strict=True)},
        firsts=tuple(samples.first.tolist()),
    )


def _broken(path: str, index: Kept, texts: Kept) -> list[Broken]:
    """What of a shard cannot be used: what the scan has lost, and samples that have no segments."""
    found = [Broken(path, key, why) for key, why in notes_of(*index)]
    if texts.table is not index.table:
        return found + [Broken(path, key, why) for key, why in notes_of(*texts)]
    if len(texts.table.rows("lines", index.shard)) == len(index.table.rows("samples", index.shard)):
        return found  # without a look at them
    samples, keys = index.table.rows("samples", index.shard), index.table.rows("keys", index.shard)
    for sample in samples[samples["chat"]]:
        key = keys[int(sample["key"]) : int(sample["key"]) + int(sample["key_bytes"])].tobytes()
        found.append(Broken(path, key.decode("utf-8", "surrogatepass"), NO_TEMPLATE))
    return found
