"""Text that describes a data set: `data index`, `data inspect` and the header of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mm.data.building import current_indexes, kept_indexes
from mm.data.columns.entries import notes_of
from mm.data.index import find_shards, load_index, named_layout
from mm.data.layouts.find import NAMES, Spec
from mm.data.published import PublishedTokenizer
from mm.data.sample import Index, Sample, Tally
from mm.data.storage import LOCAL, Storage
from mm.data.tally import shard_numbers, tally_of
from mm.data.tokenizer import AnyTokenizer
from mm.data.tokens import kept_texts
from mm.errors import DataError

SHOWN = 3  # reasons that are listed for one shard
SHARDS_SHOWN = 8  # shards that are listed


def index_text(
    patterns: Sequence[str],
    base: Path,
    tokenizer: AnyTokenizer | None = None,
    layout: Spec = None,
    *,
    again: bool = False,
    storage: Storage = LOCAL,
) -> str:
    """Make the indexes that are missing; returns a line for each shard, and what it has lost.

    tokenizer: measure texts in its tokens too. layout: as in load_index. again: scan all shards. Raises
    DataError where a shard has no sample, or its index cannot be written.
    """
    shards, asked = find_shards(patterns, base, storage=storage), named_layout(layout)
    indexes = kept_indexes(shards, asked, again=again, storage=storage)
    texts = indexes
    if isinstance(tokenizer, PublishedTokenizer):
        texts = kept_texts(shards, indexes, tokenizer, storage=storage)
    lines, wrong, good = [], [], 0
    now = current_indexes(shards, asked, storage)
    for shard, index, text in zip(shards, indexes, texts, strict=True):
        notes = [note for own in dict.fromkeys((index, text)) for note in notes_of(*own)]
        lost = [f"{key}: {why}" if key else why for key, why in notes]
        count = len(index.table.rows("samples", index.shard))
        if not count:
            why = "; ".join(lost[:SHOWN]) or "it is empty"
            wrong.append(
                f"{shard} has no sample ({why}); needed: for each a KEY.json with its segments and its items "
                f"beside it, or data.layout (--layout): {', '.join(NAMES)}, a mapping. Nothing is written"
            )
        elif shard not in now:
            wrong.append(
                f"{storage.folder_of(shard)} cannot be written; {shard} would be indexed at each start"
            )
        else:
            good += 1
            if text is not index:
                count = len(text.table.rows("lines", text.shard))
            lines += [f"{shard}: {count} samples, {len(lost)} broken", *_some(lost)]
    if wrong:
        raise DataError("; ".join([*wrong, *([f"the other {good} shards are indexed"] if good else [])]))
    return "\n".join(lines)


def inspect_text(
    patterns: Sequence[str],
    base: Path,
    tokenizer: AnyTokenizer | None = None,
    layout: Spec = None,
    storage: Storage = LOCAL,
) -> str:
    """Counts of samples and shards, text lengths, items by module and sample, and what is broken."""
    index = load_index(patterns, base, layout=layout, tokenizer=tokenizer, storage=storage)
    unit = "tokens" if isinstance(tokenizer, PublishedTokenizer) else "bytes"
    text = [sum(seg.tokens for seg in s.segments) for s in index.samples]
    lines = [
        f"{len(index.samples)} samples in {len(index.shards)} shards",
        f"text: {min(text)}-{max(text)} {unit} a sample, mean {sum(text) / len(text):.1f}",
    ]
    for module in modules_of(index.samples):
        counts = Counter(len(s.items(module)) for s in index.samples)
        spread = ", ".join(f"{n} samples with {k}" for k, n in sorted(counts.items()))
        size = sum(p.size for s in index.samples for p in s.items(module))
        found = f"{module}: {sum(k * n for k, n in counts.items())} items, {size} bytes ({spread})"
        frames = [p.meta["pictures"] for s in index.samples for p in s.items(module) if "pictures" in p.meta]
        if frames:
            found += f", {len(frames)} of them videos of {min(frames)}-{max(frames)} frames"
        lines.append(found)
    lines += [f"no part of a sample: {n} files of {shard}" for shard, n in index.ignored.items() if n]
    lines += [f"torn: {shard}" for shard in index.torn]
    lines += [f"broken: {key or 'a part'} of {shard}: {why}" for shard, key, why in index.broken]
    return "\n".join(lines)


def modules_of(samples: Sequence[Sample]) -> list[str]:
    """The modules that samples have items of."""
    return sorted({s.kind for x in samples for s in x.segments if s.part is not None})


def count_lines(name: str, index: Index, modules: Collection[str] = ()) -> list[str]:
    """What a run reads of the data set `name`: counts in total and by file, and what is left out and why.

    Of many files only those with most losses are listed. modules: each is warned of where it has no item.
    """
    tally, ids = tally_of(index), list(index.skipped)
    where = [index.shards[k] for k in shard_numbers(index.samples, index.shards, ids)]
    lost = Counter(dict.fromkeys(index.shards, 0))
    lost.update(b.shard for b in index.broken)
    lost.update(where)
    shown = {shard for shard, _ in lost.most_common(SHARDS_SHOWN)}
    reasons: dict[str, list[str]] = {shard: [] for shard in shown}
    for shard, key, why in index.broken:
        if len(reasons.get(shard, range(SHOWN))) < SHOWN:
            reasons[shard].append(f"unreadable: {key}: {why}" if key else f"unreadable: {why}")
    for number, shard in zip(ids, where, strict=True):
        if len(reasons.get(shard, range(SHOWN))) < SHOWN:
            skip = index.skipped[number]
            reasons[shard].append(f"{skip.kind}: {skip.why}")
    out = [f"{name} data: {_count(tally, slice(None))} in {len(index.shards)} files"]
    for k, shard in enumerate(index.shards):
        if shard in shown:
            out += [f"  {_near(shard)}: {_file(index, tally, k, lost[shard])}"]
            out += [f"  {line}" for line in _some(reasons[shard], lost[shard])]
    if len(lost) > len(shown):
        out.append(f"  and {len(lost) - len(shown)} more files")
    unfed = [m for m in modules if m not in tally.items]
    return out + [f"warning: no sample has an item for module {m}: it learns nothing" for m in unfed]


def _near(shard: str) -> str:
    """The path of a shard; relative to the working folder where it is inside it."""
    here = Path.cwd()
    return str(Path(shard).relative_to(here)) if Path(shard).is_relative_to(here) else shard


def _file(index: Index, tally: Tally, number: int, lost: int) -> str:
    shard = index.shards[number]
    more = {
        "left out": lost,
        "truncated to data.context": int(tally.truncated[number]),
        f"split into {tally.portions[number]} portions": int(tally.split[number]),
        "files that are no part of a sample": index.ignored.get(shard, 0),
    }
    counts = [_count(tally, slice(number, number + 1)), *(f"{n} {what}" for what, n in more.items() if n)]
    return ", ".join([*counts, *(["torn"] if shard in index.torn else [])])


def _count(tally: Tally, shards: slice) -> str:
    items = {module: int(count[shards].sum()) for module, count in tally.items.items()}
    said = [f"{n} {module} items" for module, n in items.items() if n]
    return ", ".join([f"{tally.samples[shards].sum()} samples", *said])


def _some(reasons: Sequence[str], count: int | None = None) -> list[str]:
    """Lines of the first reasons. count: of all, where these are but the first."""
    count = len(reasons) if count is None else count
    more = [f"and {count - SHOWN} more"] if count > SHOWN else []
    return [f"  {line}" for line in [*reasons[:SHOWN], *more]]
