"""The index of a data set: its samples as columns, with the offset of every payload.

Text stays in the shards; the index has only its length, in bytes, or in tokens of a published tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mm.data.building import Kept, kept_indexes
from mm.data.columns.entries import notes_of
from mm.data.columns.samples import Samples, Shard
from mm.data.convert.records import kind_name
from mm.data.encode import NO_TEMPLATE
from mm.data.layouts.find import Spec, layout_name
from mm.data.probes import register_probe as register_probe  # documented here for users
from mm.data.published import PublishedTokenizer
from mm.data.remote.urls import is_remote, public
from mm.data.sample import Broken, Index
from mm.data.sources import Wanted, selected, source_names
from mm.data.storage import LOCAL, Storage
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


def find_shards(
    patterns: Sequence[str], base: Path, made_by: str | None = None, storage: Storage = LOCAL
) -> list[str]:
    """The shards that globs and brace patterns match: URLs, or paths relative to base.

    made_by: the command that makes them, for the error. Raises DataError where a pattern matches nothing, or
    files that data convert would read.
    """
    out: list[str] = []
    for pattern in patterns:
        found = storage.find(pattern if is_remote(pattern) else str(base / pattern))
        if not found:
            raise DataError(f"no shard matches {_instead(pattern, base, made_by)}")
        other = next((path for path in found if kind_name(Path(path)) not in (None, ".tar")), None)
        if other is not None:
            raise DataError(f"{public(other)} is no tar; needed: shards{CONVERTS}")
        out += found
    return out


def _instead(pattern: str, base: Path, made_by: str | None) -> str:
    """A pattern that matches nothing, where, what is there, and what makes shards."""
    made = "" if made_by is None else f"; this makes it: {made_by}"
    if is_remote(pattern):
        return f"{public(pattern)!r}: the store lists no such object{made}"
    folder = (base / pattern).parent
    if not folder.is_dir():
        return f"{pattern!r} in {folder}: the folder does not exist{made}"
    have = sorted(p.name for p in folder.glob("*.tar"))
    hint = made or ("" if have else CONVERTS)
    return f"{pattern!r} in {folder}: it has {', '.join(have[:5]) or 'no tar'}{hint}"


def load_index(
    sources: Sequence[str | Wanted],
    base: Path,
    *,
    layout: Spec = None,
    tokenizer: AnyTokenizer | None = None,
    made_by: str | None = None,
    write: bool = True,
    storage: Storage = LOCAL,
) -> Index:
    """The data set of some sources; a pattern is one whose samples are all taken.

    layout: how samples are written (mm/data/layouts); None: what each shard looks like. tokenizer: in whose
    tokens lengths are; None: bytes. write: keep new index files beside the shards. made_by: as in
    find_shards. storage: what reads them. Raises DataError where a pattern matches nothing, a shard is
    compressed, there is no such layout, or no sample is usable.
    """
    wanted = [Wanted((one,)) if isinstance(one, str) else one for one in sources]
    of = [find_shards(w.patterns, base, made_by, storage) for w in wanted]
    paths = [path for own in of for path in own]
    layouts = [named_layout(layout if w.layout is None else w.layout) for w in wanted]
    indexes = _indexes([*zip(layouts, of, strict=True)], write, storage)
    texts = indexes
    if isinstance(tokenizer, PublishedTokenizer):
        texts = kept_texts(paths, indexes, tokenizer, write=write, storage=storage)
    given = [w.name for w, own in zip(wanted, of, strict=True) for _ in own]
    names = [own or name for own, name in zip(given, source_names(paths), strict=True)]
    both = list(zip(paths, names, indexes, texts, strict=True))
    samples = Samples([Shard(path, source, index, text) for path, source, index, text in both])
    broken = [b for path, _, index, text in both for b in _broken(path, index, text)]
    if not len(samples):
        why = "; ".join(f"{key or 'all'} of {shard}: {what}" for shard, key, what in broken[:3])
        where = ", ".join(public(p) for w in wanted for p in w.patterns)
        raise DataError(f"no usable sample in {where}: {why or 'the shards are empty'}")
    facts = [index.table.columns["shards"][index.shard] for index in indexes]
    index = Index(
        samples,
        tuple(broken),
        shards=tuple(paths),
        torn=tuple(p for p, own in zip(paths, facts, strict=True) if own["torn"]),
        ignored={p: int(own["ignored"]) for p, own in zip(paths, facts, strict=True)},
        firsts=tuple(samples.first.tolist()),
    )
    if all(isinstance(one, str) for one in sources):
        return index
    counts = [(w, len(own)) for w, own in zip(wanted, of, strict=True)]
    return replace(index, selections=selected(samples, counts, names))


def _indexes(of: Sequence[tuple[str, list[str]]], write: bool, storage: Storage) -> list[Kept]:
    """The index of each shard, those of one layout together. of: by source, its layout and shards."""
    kept: dict[tuple[str, str], Kept] = {}
    for one in dict.fromkeys(layout for layout, _ in of):
        mine = [path for layout, own in of for path in own if layout == one]
        found = kept_indexes(mine, one, write=write, storage=storage)
        kept |= {(one, path): index for path, index in zip(mine, found, strict=True)}
    return [kept[layout, path] for layout, own in of for path in own]


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
