"""All ranks of a job matched: each traced where they are few, else one of each kind in place of all.

Ranks are of one kind where they run the same program of the schedule on tensors of the same shapes, as far as
the step plan shows: equal stages, equal lengths, equal items. The first rank of each kind is traced, and
some more, its twins, whose traces must be equal. Each other rank then has its program, with its own groups
and peers. What an edge brings from and to each rank differs even among ranks of one kind: edges.py compares
that for all ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import Microbatch, StepPlan
from mm.virtual.edges import edge_problems
from mm.virtual.match import Channel, Program, Result, match_programs, program_of
from mm.virtual.records import Call, Exchanged, Trace
from mm.virtual.run import first_plan, virtual_rank
from mm.virtual.samples import virtual_data
from mm.virtual.sums import is_sum, sum_problems, sums_at
from mm.virtual.workers import trace_ranks
from parallel.topology.groups import GroupPlan, Ranks
from parallel.topology.layout import Layout

PASSES = 4  # of all ranks, until what they tell each other no longer changes


def match_all(
    blueprint: Blueprint, device: torch.device, *, skew: float = 1.0, workers: int = 1
) -> tuple[list[Trace], Result]:
    """Trace every rank and match the traces.

    Row counts that ranks tell each other follow from what each has drawn: the ranks are traced again with
    what the others gave them, until that changes no more. workers: of trace_ranks().
    """
    data = virtual_data(blueprint)
    gave: dict[int, Exchanged] = {}
    traces: list[Trace] = []

    def trace(rank: int) -> Trace:
        return virtual_rank(blueprint, rank, device, data=data, skew=skew, gave=gave)

    for _ in range(PASSES):
        traces = trace_ranks(trace, range(blueprint.world), workers)
        now = {t.rank: t.exchanged for t in traces}
        if _equal(gave, now):
            break
        gave = now
    return traces, match_programs([program_of(t) for t in traces], buffered=device.type == "cpu")


def _equal(a: Mapping[int, Exchanged], b: Mapping[int, Exchanged]) -> bool:
    if not any(b.values()):
        return True  # nobody tells anybody anything
    if a.keys() != b.keys() or any(a[r].keys() != b[r].keys() for r in a):
        return False
    return all(
        len(a[r][c]) == len(b[r][c]) and all(map(np.array_equal, a[r][c], b[r][c])) for r in a for c in a[r]
    )


def match_representatives(
    blueprint: Blueprint, device: torch.device, *, skew: float = 1.0, twins: int = 1, workers: int = 1
) -> tuple[list[Trace], Result]:
    """Trace the first rank of each kind and its twins, on samples of one length, and match all ranks.

    device: an accelerator; on hosts edges are messages, which this cannot place on other ranks. twins: more
    ranks of each kind that are traced, the last first, as its shards are the shortest, then some that the
    job's seed chooses. workers: of trace_ranks().
    """
    if device.type == "cpu":
        raise ValueError("programs of ranks are for run.device: cuda; on the CPU every rank has to be traced")
    data = virtual_data(blueprint, even=True)
    plan = first_plan(blueprint, data.index)
    kinds = list(kinds_of(blueprint, plan, skew).values())
    seed = blueprint.cfg.run.seed
    chosen = [r for ranks in kinds for r in (ranks[0], *twins_of(ranks, twins, seed))]
    traces = trace_ranks(lambda r: virtual_rank(blueprint, r, device, data=data, skew=skew), chosen, workers)
    return traces, match_kinds(blueprint, plan, kinds, traces)


def match_kinds(
    blueprint: Blueprint, plan: StepPlan, kinds: Iterable[Sequence[int]], traces: Sequence[Trace]
) -> Result:
    """Match all ranks. kinds: the ranks of each, in order; traces: of the first of each and its twins."""
    traced = {t.rank: t for t in traces}
    problems: list[str] = []
    programs: list[Program] = []
    named = communicators(blueprint.groups)
    for ranks in kinds:
        first, *twins = (traced[r] for r in ranks if r in traced)
        problems += [why for twin in twins for why in unlike(first, twin)]
        problems += [why for t in (first, *twins) for why in sum_problems(t, named[t.rank])]
        bare = without_edges(first)
        programs += [program_at(bare, program_of(bare), r, named[r]) for r in ranks]
    problems += edge_problems(blueprint, plan, traces)
    result = match_programs(programs)
    return replace(result, problems=problems + result.problems)


def twins_of(ranks: Sequence[int], twins: int, seed: int) -> list[int]:
    """Up to `twins` further ranks of a kind: the last, then some drawn by `seed`."""
    drawn = np.random.default_rng(seed).permutation(ranks[1:-1])
    return [*ranks[1:][-1:], *map(int, drawn)][:twins]


def kinds_of(blueprint: Blueprint, plan: StepPlan, skew: float = 1.0) -> dict[Hashable, list[int]]:
    """The ranks of each kind, in order. skew: of drawn_choices()."""
    schedule, named = blueprint.schedule(plan.active), communicators(blueprint.groups)
    items = {
        (m, k, dp): tuple(found)
        for k, mb in enumerate(plan.microbatches)
        for m in mb.edges
        for dp, found in _items_of(mb, m).items()
    }
    out: dict[Hashable, list[int]] = {}
    for rank in range(blueprint.world):
        kind: list[Hashable] = [schedule.program_of.get(rank), tuple(named[rank])]
        for m, layout in blueprint.layouts.items():
            if rank not in _set(layout):
                kind.append(None)
                continue
            at = layout.coord(rank)
            micro = range(len(plan.microbatches))
            if m == SINK:
                streams = [
                    (mb.tokens[at.dp], tuple(mb.length[j] for j in mb.samples_of(at.dp)))
                    for mb in plan.microbatches
                ]
                padded = any(tokens != sum(lengths) for tokens, lengths in streams)
                # In zigzag order a scan passes its states to neighbours, and which these are depends on cp.
                passes = at.cp if layout.cp > 1 and blueprint.inputs.order == "zigzag" else 0
                shapes: tuple[Hashable, ...] = tuple(streams)
            else:
                shapes = tuple(items.get((m, k, at.dp), ()) for k in micro)
                padded, passes = True, 0
            # Ranks that share a stream have equal parts of it, unless some of it is padding.
            parts = (at.tp, at.cp) if padded and (layout.cp > 1 or layout.tp > 1) else ()
            # With equal rows for every expert, so have the ranks of ep.
            even = m != SINK or _even_rows(blueprint, plan, at.dp, skew)
            kind.append((at.pp, parts, passes, () if even else layout.expert_coord(rank).ep, shapes))
        out.setdefault(tuple(kind), []).append(rank)
    return out


def _even_rows(blueprint: Blueprint, plan: StepPlan, dp: int, skew: float) -> bool:
    """Whether every expert gets equally many rows from a rank of the language model."""
    llm, layout = blueprint.llm, blueprint.layouts[SINK]
    if layout.ep == 1 or not llm.n_experts:
        return True
    ranks = layout.tp * layout.cp
    return skew <= 1 and all(
        mb.tokens[dp] // ranks * llm.top_k % llm.n_experts == 0 for mb in plan.microbatches
    )


@cache
def _set(layout: Layout) -> frozenset[int]:
    return frozenset(layout.ranks)


def _items_of(mb: Microbatch, module: str) -> dict[int, list[Hashable]]:
    """By dp rank of an encoder, the rows and costs of its items."""
    out: dict[int, list[Hashable]] = {}
    for item in (i for i in mb.edges[module].items if i.same_as is None):
        out.setdefault(item.source_dp, []).append((item.rows, item.cost))
    return out


def unlike(a: Trace, b: Trace) -> list[str]:
    """What differs between the traces of two ranks of one kind, in words: at most one line."""
    if a is b:
        return []
    ours, theirs = ([_likeness(c, t) for c in t.calls] for t in (a, b))
    for k, (x, y) in enumerate(zip(ours, theirs, strict=False)):
        if x != y:
            return [f"ranks {a.rank} and {b.rank} should be alike, but call {k} is {x} and {y}"]
    if len(ours) != len(theirs) or a.waits != b.waits:
        return [f"ranks {a.rank} and {b.rank} should be alike, but make {len(ours)} and {len(theirs)} calls"]
    return []


def _likeness(call: Call, trace: Trace) -> tuple[object, ...]:
    size = 0 if _is_edge(call) or is_sum(call, trace) else call.bytes
    return call.op, call.group, size, call.dtype, call.during, call.posted, call.sends if size else ()


def _is_edge(call: Call) -> bool:
    return call.group.startswith("edge.")


def without_edges(trace: Trace) -> Trace:
    """The trace without the sizes of calls over edges, which differ between ranks of one kind."""
    calls = tuple(replace(c, bytes=0, sends=(), receives=()) if _is_edge(c) else c for c in trace.calls)
    assert all(c.peer is None for c in calls if _is_edge(c)), "edges must be collectives here"
    return replace(trace, calls=calls)


def communicators(plan: GroupPlan) -> list[dict[str, Ranks]]:
    """By rank, the ranks of its communicators by name. Names of one are joined as group_names() does."""
    named: list[dict[tuple[str, Ranks], list[str]]] = [{} for _ in range(plan.world)]
    for name, groups in plan.named.items():
        for ranks in groups:
            for r in ranks:
                named[r].setdefault((name.lane, ranks), []).append(str(name))
    return [{"=".join(found): ranks for (_, ranks), found in own.items()} for own in named]


def program_at(trace: Trace, traced: Program, rank: int, named: Mapping[str, Ranks]) -> Program:
    """The program of another rank of the same kind. traced: that of the trace. named: its communicators."""
    if rank == trace.rank:
        return traced
    channels = {own: Channel(c.name, named[c.name]) for own, c in traced.traced.items()}
    posts, at = list(traced.posts), {id(c): k for k, c in enumerate(trace.calls)}
    sizes = dict(sums_at(trace, rank, named))
    for k, post in enumerate(posts):
        size = sizes.get(at[id(post[0])])
        if size is not None:
            posts[k] = (replace(post[0], bytes=size),)
    return replace(traced, rank=rank, posts=posts, channels=channels)
