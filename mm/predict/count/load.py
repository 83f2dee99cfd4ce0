"""What one rank computes in one micro-batch, from a step's plan. Pure.

Loads are a table in the plan's memo, by module, micro-batch and place, each worked out once: ranks of one
place in tp, cp and dp have equal ones, whatever their pipeline rank. They follow from the plan, from the
dense degrees and from the encoders alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch

from encoders.fastconformer import FastConformer
from encoders.module import encoder_axes
from encoders.share import Share, pieces, reach
from encoders.vision.model import VisionTransformer
from encoders.vision.tokens import frame_lengths, places
from llm.config import LLMConfig
from mm.data.sample import Sample
from mm.plan.inputs import EncoderUse
from mm.plan.step_plan import Microbatch, StepPlan
from mm.predict.count.encoder import Fetched, ItemLoad
from mm.predict.count.packed import attended, in_windows, key_crossing, scan_crossing, window_crossing
from mm.predict.count.sizes import Degrees, TokenLoad, Windowed
from parallel.context_parallel import ContextPacking, pack
from parallel.expert_parallel import routed_tokens
from parallel.topology.axis import Axes, Axis
from parallel.topology.layout import Coord, Layout

CPU = torch.device("cpu")
T = TypeVar("T")


def axis_of(name: str, size: int, rank: int) -> Axis:
    """An axis that nothing is sent over."""
    return Axis(name, size, rank, group=cast(Any, None if size == 1 else object()))


def axes_of(layout: Layout, at: Coord) -> Axes:
    """The axes of a rank's place, for what follows from sizes alone."""
    return Axes(
        tp=axis_of("tp", layout.tp, at.tp),
        cp=axis_of("cp", layout.cp, at.cp),
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
    )


def once(plan: StepPlan, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, worked out once for a plan."""
    if key not in plan.memo:
        plan.memo[key] = make()
    found: T = plan.memo[key]
    return found


def token_load(mb: Microbatch, at: Coord, cfg: LLMConfig, item: int) -> TokenLoad:
    """What the language model's rank at a place computes in a micro-batch. item: bytes of an element."""
    key = "tokens", mb.index, at[:3], item
    return once(mb.plan, key, lambda: _token_load(mb, at, cfg, item))


def _token_load(mb: Microbatch, at: Coord, cfg: LLMConfig, item: int) -> TokenLoad:
    inputs, layout = mb.plan.inputs, mb.plan.inputs.llm
    mine, total = mb.samples_of(at.dp), mb.tokens[at.dp]
    lengths = [mb.length[j] for j in mine]
    real = sum(lengths)
    documents = [*lengths, *([total - real] if real < total else [])]
    packing = pack(documents, CPU, axis_of("cp", layout.cp, at.cp), inputs.order)
    crossing, scan = None, None
    window = cfg.window if "*" in cfg.kinds else None
    windows = None if window is None else Windowed(in_windows(documents, documents, window))
    if isinstance(packing, ContextPacking):
        scan = scan_crossing(cfg, packing, layout.tp, item) if "M" in cfg.kinds else None
        real, documents = packing.rows_before(real), list(packing.fragments.lengths)
        crossing = key_crossing(cfg, packing, layout.tp, at.tp, item) if "*" in cfg.kinds else None
        windows = None if window is None else window_crossing(packing, window)
    width = total // (layout.cp * layout.tp)
    return TokenLoad(
        tokens=total // layout.cp,
        routed=min(max(real - at.tp * width, 0), width),
        documents=len(documents),
        attended=attended(documents, documents),
        supervised=_supervised(mb, mine, packing if isinstance(packing, ContextPacking) else None),
        crossing=crossing,
        scan=scan,
        windowed=windows,
    )


def widest(mb: Microbatch, layout: Layout, at: Coord) -> int:
    """The most tokens that a rank of ep routes, of those that share experts with the one at a place."""

    def most() -> int:
        rank = layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp)
        real = mb.plan.filled[mb.index].tolist()
        found = routed_tokens(layout, rank, mb.tokens, real, mb.plan.inputs.order)
        return max(found[layout.expert_coord(rank).etp])

    return once(mb.plan, ("widest", mb.index, at[:3], layout.ep, layout.etp), most)


def _supervised(mb: Microbatch, mine: Sequence[int], packing: ContextPacking | None) -> tuple[int, ...]:
    """Tokens with a loss here, of the next token and of each depth after it."""
    table, first, depths = mb.plan.table, int(mb.plan.bounds[mb.index]), mb.plan.inputs.mtp_depths
    if packing is None:
        lines = first + np.asarray(mine, np.int64)
        later = [int(row[lines].sum()) for row in table.mtp] if depths else []
        return (int(table.supervised[lines].sum()), *later)
    labels = np.zeros(packing.whole, dtype=bool)
    ends = np.zeros(packing.whole, dtype=np.int64)  # of each token's document
    at = 0
    for j in mine:
        ends[at : at + mb.length[j]] = at + mb.length[j]
        at = _mark(labels, at, mb.sample(j), mb.plan.inputs.rows)
    rows, out = packing.rows, [labels]
    for k in range(1, depths + 1):
        there = np.arange(len(labels)) + k
        out.append((there < ends) & labels[np.minimum(there, len(labels) - 1)])
    return tuple(int(x[rows].sum()) for x in out)


def _mark(labels: np.ndarray, at: int, sample: Sample, rows: Any) -> int:
    """Mark tokens with a loss of a sample that begins at `at`, as mm.ranks.batch writes them; its end."""
    at += sample.markers
    for seg in sample.segments:
        n = rows(seg.kind, seg.part) if seg.part is not None else seg.tokens
        if seg.part is None and seg.loss:
            labels[at - 1 : at + n - 1] = True
        at += n
    if sample.markers:
        labels[at - 1] = labels[at - 1] or not sample.truncated
        at += 1
    return at


def item_load(mb: Microbatch, module: str, use: EncoderUse, at: Coord) -> ItemLoad | None:
    """What an encoder's rank at a place computes in a micro-batch; None where no rank has items."""
    if not mb.edges[module].count:
        return None
    key = "items", module, mb.index, at[:3]
    return once(mb.plan, key, lambda: items_load(use, metas_on(mb, module, at.dp), at, module))


def metas_on(mb: Microbatch, module: str, dp: int) -> Sequence[Any]:
    """Metadata of the items that a dp rank of an encoder computes, in order of global row id."""
    return once(mb.plan, ("metas", module), lambda: _metas(mb.plan, module))[mb.index, dp]


def _metas(plan: StepPlan, module: str) -> Mapping[tuple[int, int], Sequence[Any]]:
    """By (micro-batch, dp rank), metadata of its items. O(items)."""
    columns = plan.items[module].columns
    own = np.ones(len(columns.rows), bool) if columns.own is None else columns.own
    out: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
    for k, dp, computed, meta in zip(
        columns.batch.tolist(),
        columns.source_dp.tolist(),
        own.tolist(),
        plan.table.metas(module),
        strict=True,
    ):
        if computed:
            out[k, dp].append(meta)
    return out


def rows_entering(mb: Microbatch, source: str, layout: Layout, at: Coord) -> int:
    """Rows of an encoder that enter the language model in a micro-batch on the rank at a place."""
    found = once(mb.plan, ("entering", source, mb.index), lambda: mb.edges[source].row_counts)
    return int(found[at.dp, at.cp, at.tp % layout.token_shards])


def items_load(use: EncoderUse, metas: Sequence[Any], at: Coord, module: str) -> ItemLoad:
    """What items of this metadata are to a rank at a place."""
    cls, cfg, layout = use.cls, use.cfg, use.layout
    axes = encoder_axes(cls, axes_of(layout, at))
    rows = [cls.rows(cfg, meta) for meta in metas]
    tails = [cls.tail_tokens(cfg, meta) for meta in metas]
    unit, prefix = cls.tokens_per_row(cfg), cls.prefix_tokens(cfg)
    share = Share.of(rows, axes, unit, prefix, tails)
    outer = Share.of(rows, axes_of(layout, at))
    own = pieces(share.lengths, share.own)
    within, stem = share.lengths, 0
    if issubclass(cls, VisionTransformer):  # which attends within frames
        grids = [cls.grid(cfg, meta) for meta in metas]
        within = frame_lengths(grids, cfg.prefix)
        stem = share.kept
        if cfg.prefix:
            at_tokens = places(grids, share, share.part, prefix=cfg.prefix, merge=cfg.merge)
            stem = int((at_tokens.prefix < 0).sum())
    seen = pieces(within, share.own)
    queries, keys = [p.stop - p.start for p in seen], [within[p.item] for p in seen]
    if issubclass(cls, FastConformer):
        kept = pieces(share.lengths, share.part)
        frames = [min(8 * p.stop, cls.frames(cfg, metas[p.item])) - 8 * p.start for p in kept]
        if kept and kept[0].start:
            frames[0] += 8
        stem = sum(8 * (-(-n // 8) + 1) for n in frames) or 8
    group = Degrees(module).group("cp")
    near = None
    if issubclass(cls, FastConformer):
        near = _fetched(share, [reach(share.lengths, s, cfg.kernel // 2) for s in share.spans], at.cp, group)
    return ItemLoad(
        tokens=share.tokens,
        kept=share.kept,
        rows=outer.kept,
        attended=attended(queries, keys),
        stem=stem,
        keys=_fetched(share, [reach(within, s) for s in share.spans], at.cp, group),
        near=near,
        items=len(own),
        flops=sum(cls.cost(cfg, meta) for meta in metas) / layout.cp,
    )


def _fetched(share: Share, wanted: Sequence[tuple[int, int]], me: int, group: Any) -> Fetched | None:
    """The exchange that brings wanted stretches; None where no row moves."""
    if all(a >= c and b <= d for (a, b), (c, d) in zip(wanted, share.spans, strict=True)):
        return None
    held, want = share.spans[me], wanted[me]
    own, mine = held[1] - held[0], want[1] - want[0]
    both = max(0, min(held[1], want[1]) - max(held[0], want[0]))
    given = sum(max(0, min(held[1], b) - max(held[0], a)) for r, (a, b) in enumerate(wanted) if r != me)
    return Fetched(own, mine, max(given, mine - both), group)
