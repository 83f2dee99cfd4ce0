"""What is in a data set, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mm.data.index import find_shards, index_path, load_index, read_or_build


def index_text(patterns: Sequence[str], base: Path) -> str:
    """Make the indexes that are missing; one line a shard."""
    lines = []
    for shard in find_shards(patterns, base):
        raw = read_or_build(shard)
        lines.append(f"{index_path(shard)}: {len(raw['samples'])} samples, {len(raw['broken'])} broken")
    return "\n".join(lines)


def inspect_text(patterns: Sequence[str], base: Path) -> str:
    """Counts, items a sample and module, text lengths, and what is broken."""
    index = load_index(patterns, base)
    modules = sorted({s.kind for x in index.samples for s in x.segments if s.part is not None})
    shards = {s.shard for s in index.samples}
    text = [sum(seg.text_bytes for seg in s.segments) for s in index.samples]
    lines = [
        f"{len(index.samples)} samples in {len(shards)} shards",
        f"text: {min(text)}-{max(text)} bytes a sample, mean {sum(text) / len(text):.1f}",
    ]
    for module in modules:
        counts = Counter(len(s.items(module)) for s in index.samples)
        spread = ", ".join(f"{n} samples with {k}" for k, n in sorted(counts.items()))
        size = sum(p.size for s in index.samples for p in s.items(module))
        lines.append(f"{module}: {sum(k * n for k, n in counts.items())} items, {size} bytes ({spread})")
    lines += [f"broken: {key} of {shard}: {why}" for shard, key, why in index.broken]
    return "\n".join(lines)
