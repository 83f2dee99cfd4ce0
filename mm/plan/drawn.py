"""What a run has taken of its data: counts by data set, where it goes on, and what that depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mm.config.schema import Config
from mm.data.sample import Index, ShardSums
from mm.errors import Refused
from mm.order.chosen import Range
from mm.order.skips import NONE, Skips
from mm.plan.batches import START, Cursor
from mm.plan.sources import stream_of
from mm.plan.step_plan import StepPlan

MOST = 4  # shards that a refusal names
Named = Callable[[ShardSums, ShardSums], str]  # which samples of a shard are different; "" where unknown


class Count(NamedTuple):
    """Samples that were taken, and their tokens with rows and markers."""

    samples: int
    tokens: int


@dataclass(frozen=True)
class Drawn:
    """by_source: by data set, what was taken of it so far. cursor: where the next step begins, where samples
    are packed. left_out: batches that were left out before that."""

    by_source: Mapping[str, Count] = field(default_factory=dict)
    cursor: Cursor = START
    left_out: Skips = NONE

    def after(self, plan: StepPlan, skips: Skips = NONE) -> Drawn:
        """With a step more. skips: batches that the run leaves out."""
        table, found = plan.table, dict(self.by_source)
        samples = np.bincount(table.source, minlength=len(table.sources)).tolist()
        tokens = np.bincount(table.source, table.length, len(table.sources)).astype(np.int64).tolist()
        for name, n, length in zip(table.sources, samples, tokens, strict=True):
            if n:
                old = found.get(name, Count(0, 0))
                found[name] = Count(old.samples + n, old.tokens + length)
        cursor = self.cursor if plan.ends is None else Cursor(*plan.ends)
        return Drawn(dict(sorted(found.items())), cursor, skips.passed(plan.step + 1))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        by_source = {k: list(v) for k, v in self.by_source.items()}
        out: dict[str, Any] = {"by_source": by_source, "cursor": list(self.cursor)}
        if self.left_out.spans:
            out["left_out"] = self.left_out.written()
        return out

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Drawn:
        """What to_json() gave."""
        by_source = {k: Count(*v) for k, v in data["by_source"].items()}
        return Drawn(by_source, Cursor(*data["cursor"]), Skips.parse(data.get("left_out", ())))

    def going_on(self, step: int, wanted: Skips) -> Skips:
        """The batches that a run leaves out which goes on after `step` steps: those that it has left out so
        far, and those that are wanted. Raises Refused where a wanted one has been trained on."""
        both = self.left_out.with_more(wanted)
        if both.before(step) != self.left_out.before(step):
            past = self.left_out.before(step)
            raise Refused(
                f"data.skip={wanted.written()} names batches that the first {step} steps were trained on: "
                f"they took batches up to {past}; needed: batches from {past + 1} on, or an older checkpoint "
                "(checkpoint.resume=PATH)"
            )
        return both


NOTHING = Drawn()


def history(cfg: Config, index: Index, step: int, cursor: Cursor, skips: Skips = NONE) -> dict[str, Any]:
    """All that the samples of the first `step` steps depend on, as plain data; cursor: where the next begins;
    skips: batches that were left out before.

    Two configs whose histories are equal have taken the same samples so far, and go on in the same shuffles.
    Sources and weights that have not come in use do not enter.
    """
    stream, rules = stream_of(cfg, index), cfg.data
    packed: dict[str, Any] = {}
    position = skips.before(step) * cfg.train.global_batch
    if rules.pack is not None:
        packed = {"pack": rules.pack, "window": rules.window, "context": rules.context}
        position = (cursor.window + (cursor.sequence > 0)) * rules.window
        left_out = np.asarray(sorted(index.skipped), dtype=np.int64)
        packed["skipped"] = hashlib.sha256(left_out.tobytes()).hexdigest()[:16]
    end = stream.blend.end
    position = position if end is None else min(position, end)
    taken = stream.blend.taken(position).tolist()
    sources, names = {}, [s.name for s in stream.sources]
    for source, count in zip(stream.sources, taken, strict=True):
        if count or len(names) == 1:
            what = hashlib.sha256()
            for first, size, bits in source.samples.ranges:
                what.update(index.digest_of(first, first + size).encode())
                what.update(b"" if bits is None else bits.tobytes())
            epochs = -(-count // len(source.samples))
            ended = source.epochs if source.epochs is not None and epochs >= source.epochs else None
            sources[source.name] = [len(source.samples), what.hexdigest()[:16], ended]
    shards = _shards(index, [(s.name, s.samples.ranges) for s in stream.sources if s.name in sources])
    used = [s for s in stream.blend.stretches if s.start < position]
    weights = [[s.start, {n: w for n, w in zip(names, s.weights, strict=True) if w}] for s in used]
    return {"sources": sources, "weights": weights, "shard_sums": shards, **packed}


def _shards(index: Index, sources: Sequence[tuple[str, Sequence[Range]]]) -> dict[str, list[list[Any]]]:
    """By source, what its shards have, as plain data; none where the samples are of no shards."""
    sums: Sequence[ShardSums] = getattr(index.samples, "shard_sums", ())
    out: dict[str, list[list[Any]]] = {}
    for name, ranges in sources if sums else ():
        ends = [(r.first, r.first + r.size - 1) for r in ranges if r.size]
        of = index.samples.shard_of(np.asarray(ends).reshape(-1)).reshape(-1, 2)  # type: ignore[attr-defined]
        numbers = dict.fromkeys(n for first, last in of.tolist() for n in range(first, last + 1))
        out[name] = [list(sums[n]) for n in numbers if sums[n].samples]
    return out


def _nameless(was: ShardSums, now: ShardSums) -> str:
    return ""


def _of_shards(old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]], named: Named) -> str:
    """What is different in the shards of a source, in words; "" where nothing is."""
    was, now = [ShardSums(*s) for s in old], [ShardSums(*s) for s in new]
    if [s[1:] for s in was] == [s[1:] for s in now]:
        return ""  # they may have been moved or renamed
    if len({s.name for s in was}) < len(was) or len({s.name for s in now}) < len(now):
        was, now = ([s._replace(name=f"number {n + 1}") for n, s in enumerate(x)] for x in (was, now))
    before, after = {s.name: s for s in was}, {s.name: s for s in now}
    found = [f"shard {name} is gone" for name in before if name not in after]
    found += [f"shard {name} is new" for name in after if name not in before]
    for name in (name for name in before if name in after and before[name] != after[name]):
        a, b = before[name], after[name]
        if a.samples != b.samples:
            what = f"had {a.samples} samples, now {b.samples}"
        elif a.texts != b.texts:
            what = "has other texts or keys"
        else:
            what = "has other pictures, sounds or videos under the same texts"
        which = named(a, b) if len(found) < MOST else ""
        found.append(f"shard {name} {what}{f' ({which})' if which else ''}")
    found = found or ["its shards come in another order"]
    more = f", and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(found[:MOST]) + more


def _in_shards(old: Mapping[str, Any], new: Mapping[str, Any], name: str, named: Named) -> str:
    """What is different in the shards of a source, behind a colon; a checkpoint of old may not say."""
    was, now = (x.get("shard_sums", {}).get(name) for x in (old, new))
    found = _of_shards(was, now, named) if was and now else ""
    return f": {found}" if found else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], named: Named = _nameless) -> list[str]:
    """What is different in two histories, in words. named: asked for a shard that has changed."""
    out = []
    for name in sorted({*old["sources"], *new["sources"]}):
        was, now = old["sources"].get(name), new["sources"].get(name)
        what = f"source {name}" if name else "data.train"
        if was is None or now is None:
            out.append(f"{what} was {'not there' if was is None else 'there'}")
        elif was != now:
            other = f"{was[0]} samples, now {now[0]}" if was[0] != now[0] else "other samples or epochs"
            out.append(f"{what} had {other}{_in_shards(old, new, name, named)}")
        elif differ := _in_shards(old, new, name, named):
            out.append(what + differ)
    if not out and old["weights"] != new["weights"]:
        out.append(f"the weights were {old['weights']}, now {new['weights']}")
    # "shards" of older checkpoints are sums that depended on the index file too: they tell nothing.
    for key in sorted({*old, *new} - {"sources", "weights", "shard_sums", "shards"}):
        if old.get(key) != new.get(key):
            what = f"data.{key} was {old.get(key)}, now {new.get(key)}"
            out.append("other samples were left out" if key == "skipped" else what)
    return out
