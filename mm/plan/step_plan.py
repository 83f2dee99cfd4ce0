"""The step plan: what every rank loads, computes and exchanges in one step, as plain data.

It is a pure function of (config, index, seed, step, known-bad samples): every rank derives the same plan, and
ranks agree on nothing at run time (law 4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from llm.counts import Counts
from mm.data.sample import Part, Sample
from mm.errors import DataError
from parallel.boundary import RowMap, dest_side, row_positions, source_side
from parallel.sequence.intervals import shares
from parallel.sequence.stream import Order, alignment
from parallel.topology.layout import Layout

Deal = Literal["cost", "sample"]


@dataclass(frozen=True)
class EncoderUse:
    """An encoder as the planner needs it: for row counts and costs, without running anything."""

    cls: Any  # an encoders.Encoder class
    cfg: Any  # its options, an instance of cls.Config
    layout: Layout
    deal: Deal = "cost"  # how items go to its dp ranks: balanced by cost, or with their sample


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a step plan depends on, except the samples."""

    llm: Layout
    encoders: Mapping[str, EncoderUse]  # by module, in the config's order
    context: int  # longest sample allowed, in tokens: text bytes, encoder rows and two markers
    microbatches: int  # that the global batch is split into, the same for all modules
    order: Order = "contiguous"  # how cp splits the language model's packed sequences
    mtp_depths: int = 0  # of multi-token prediction: so many more tokens are predicted at each position
    _rows: dict[tuple[str, str, int], int] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, module: str, part: Part) -> int:
        """How many rows an item contributes; cached, since every epoch plans each item once.

        Raises ValueError where the item's metadata do not serve its encoder.
        """
        key = (module, part.shard, part.offset)
        if key not in self._rows:
            use = self.encoders[module]
            try:
                n = int(use.cls.rows(use.cfg, part.meta))
            except KeyError as error:
                have = ", ".join(part.meta) or "none: no probe knows this kind of file"
                raise ValueError(f"{use.cls.__name__} needs the metadata {error}, it has {have}") from error
            if n < 0:
                raise ValueError(f"{use.cls.__name__}.rows gave {n}; needed: at least 0")
            self._rows[key] = n
        return self._rows[key]

    @property
    def alignment(self) -> int:
        """Packed sequences are padded to a multiple of so many tokens: every rank then has an equal share."""
        return alignment(self.llm.cp, self.llm.tp, self.order)


@dataclass(frozen=True)
class ItemPlan:
    """One item of a micro-batch."""

    sample: int  # index of its sample in the micro-batch
    part: Part
    rows: int  # that its encoder makes of it
    cost: float  # as its encoder estimates it, in the encoder's own unit
    llm_dp: int  # dp rank of the language model that packs its sample
    position: int  # token position of its first row in the packed sequence of llm_dp
    source_dp: int  # dp rank of the encoder that computes it


class Edge(NamedTuple):
    """From an encoder to a stage of the language model that its rows enter."""

    source: str  # name of the encoder's module
    stage: int  # index among the language model's pp * vpp stages


@dataclass(frozen=True)
class Imbalance:
    """Cost of the items of an encoder's costliest dp rank over the mean of all its dp ranks; 1 is even."""

    dealt: float  # with the items on the dp ranks that compute them
    by_sample: float  # were each item on the dp rank of its sample


@dataclass(frozen=True)
class EdgePlanInputs:
    """The items of one encoder in one micro-batch, and where their rows are on both sides."""

    items: tuple[ItemPlan, ...]  # in order of global row id
    source: RowMap  # the rows as the encoder's last pipeline rank gives them
    # The rows as the language model's first pipeline rank reads them; others read their levels of these rows.
    dest: RowMap
    imbalance: Imbalance

    @property
    def rows(self) -> int:
        """Rows of all items."""
        return sum(i.rows for i in self.items)


@dataclass(frozen=True)
class Microbatch:
    """The plan of one micro-batch."""

    samples: tuple[Sample, ...]
    dp_of: tuple[int, ...]  # by sample, the dp rank of the language model that packs it
    length: tuple[int, ...]  # by sample, in tokens
    tokens: tuple[int, ...]  # by dp rank, length of its packed sequence, padded to PlanInputs.alignment
    edges: Mapping[str, EdgePlanInputs]  # by encoder module

    def samples_of(self, dp: int) -> list[int]:
        """Indices of the samples that a dp rank of the language model packs, in that order."""
        return [j for j, owner in enumerate(self.dp_of) if owner == dp]


@dataclass(frozen=True)
class StepPlan:
    """supervised: tokens of the whole step that the loss is divided by (design law 2); mtp_supervised: those
    with a loss at each depth of multi-token prediction."""

    step: int
    sample_ids: tuple[int, ...]
    microbatches: tuple[Microbatch, ...]
    supervised: int
    mtp_supervised: tuple[int, ...]

    @cached_property
    def digests(self) -> np.ndarray:
        """A 63-bit fingerprint of each sample's part of the plan, in order of the batch; int64 [samples]."""
        out = []
        for mb in self.microbatches:
            dealt: list[list[int]] = [[] for _ in mb.samples]
            for k, edge in enumerate(mb.edges.values()):
                for i in edge.items:
                    dealt[i.sample] += (k, i.rows, i.position, i.source_dp)
            for j, sample in enumerate(mb.samples):
                out.append(_fingerprint([sample.id, mb.dp_of[j], mb.length[j], *dealt[j]]))
        return np.asarray(out, dtype=np.int64)

    @cached_property
    def digest(self) -> int:
        """A 63-bit fingerprint of the whole plan, which must be equal on all ranks."""
        return _fingerprint([self.step, self.supervised, *self.mtp_supervised, *self.digests])

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(sum(mb.length) for mb in self.microbatches)

    @property
    def counts(self) -> Counts:
        """What the language model's other objectives are means over."""
        return Counts(self.tokens, self.mtp_supervised)

    @property
    def active(self) -> list[set[str]]:
        """By micro-batch, the encoders that have at least one item on any rank."""
        return [{m for m, e in mb.edges.items() if e.items} for mb in self.microbatches]


def _fingerprint(numbers: Sequence[int]) -> int:
    data = np.asarray(numbers, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def sample_length(sample: Sample, inputs: PlanInputs) -> int:
    """Tokens of a sample: a begin marker, its text bytes and item rows, an end marker.

    Raises DataError, naming the item, where its encoder cannot take it.
    """
    n = 2
    for seg in sample.segments:
        try:
            n += seg.text_bytes if seg.part is None else inputs.rows(seg.kind, seg.part)
        except ValueError as error:
            assert seg.part is not None
            where = f"{seg.part.name} of sample {sample.key} of {sample.shard}"
            raise DataError(f"{where} does not fit model.{seg.kind}: {error}") from error
    return n


def supervised_tokens(sample: Sample) -> int:
    """Tokens of a sample that carry loss: supervised text and, unless it is truncated, the end marker."""
    return (not sample.truncated) + sum(s.text_bytes for s in sample.segments if s.part is None and s.loss)


def mtp_supervised_tokens(sample: Sample, inputs: PlanInputs) -> list[int]:
    """Tokens of a sample that carry loss at each depth of multi-token prediction: those at least
    that far behind its begin."""
    total = supervised_tokens(sample)
    return [total - _supervised_before(sample, depth, inputs) for depth in range(1, inputs.mtp_depths + 1)]


def _supervised_before(sample: Sample, stop: int, inputs: PlanInputs) -> int:
    """Labels at positions below `stop`; that of a token stands one position before it."""
    at, found = 0, 0
    for seg in sample.segments:
        n = seg.text_bytes if seg.part is None else inputs.rows(seg.kind, seg.part)
        if seg.part is None and seg.loss:
            found += max(0, min(at + n, stop) - at)
        at += n
        if at >= stop:
            return found
    return found + (not sample.truncated)  # the end marker


def owner_of(n: int, parts: int) -> list[int]:
    """Which share each of n things falls into."""
    return [k for k, (a, b) in enumerate(shares(n, parts)) for _ in range(b - a)]


def deal_by_cost(costs: Sequence[float], home: Sequence[int], dp: int) -> list[int]:
    """The dp rank of each item, of `dp` ranks, so that loads are even and few items leave their home rank.

    costs, home: by item. The largest load is at most that of the longest-processing-time rule (R. L. Graham,
    "Bounds on Multiprocessing Timing Anomalies", 1969: within 4/3 of the best). Within that bound an item
    stays on its home rank, where its rows need no transfer. O(n (log n + dp)).
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    spread = _longest_first(order, costs, home, dp, stay=0.0)
    bound = max(spread[1], default=0.0)
    kept = _longest_first(order, costs, home, dp, stay=bound)
    return kept[0] if max(kept[1], default=0.0) <= bound else spread[0]


def _longest_first(
    order: Sequence[int], costs: Sequence[float], home: Sequence[int], dp: int, *, stay: float
) -> tuple[list[int], list[float]]:
    """(dp rank of each item, load of each rank), by the longest-processing-time rule.

    order: the items, the costliest first. An item stays on its home rank up to a load of `stay`, or on a tie.
    """
    load, out = [0.0] * dp, [0] * len(costs)
    for i in order:
        least = min(load)
        here = load[home[i]] + costs[i] <= stay or load[home[i]] == least
        out[i] = home[i] if here else load.index(least)
        load[out[i]] += costs[i]
    return out, load


def plan_step(step: int, samples: Sequence[Sample], inputs: PlanInputs) -> StepPlan:
    """Plan one step over `samples`, the whole global batch in order. Raises DataError (sample_length)."""
    micro = tuple(plan_microbatch(samples[a:b], inputs) for a, b in shares(len(samples), inputs.microbatches))
    ids = tuple(s.id for s in samples)
    by_sample = (mtp_supervised_tokens(s, inputs) for s in samples)
    mtp = tuple(map(sum, zip(*by_sample, strict=True)))
    return StepPlan(step, ids, micro, sum(supervised_tokens(s) for s in samples), mtp)


def plan_microbatch(samples: Sequence[Sample], inputs: PlanInputs) -> Microbatch:
    """Deal samples to LLM dp ranks and items to encoder dp ranks, and map every row on both sides."""
    llm = inputs.llm
    dp_of = owner_of(len(samples), llm.dp)
    length = [sample_length(s, inputs) for s in samples]
    start, filled = [], [0] * llm.dp
    for dp, n in zip(dp_of, length, strict=True):
        start.append(filled[dp])
        filled[dp] += n
    # Every rank gets an equal share of at least one token: no collective then meets an empty tensor.
    unit = inputs.alignment
    tokens = [max(1, -(-n // unit)) * unit for n in filled]
    edges = {module: _plan_edge(module, samples, dp_of, start, tokens, inputs) for module in inputs.encoders}
    return Microbatch(tuple(samples), tuple(dp_of), tuple(length), tuple(tokens), edges)


def _plan_edge(
    module: str,
    samples: Sequence[Sample],
    dp_of: Sequence[int],
    start: Sequence[int],
    tokens: Sequence[int],
    inputs: PlanInputs,
) -> EdgePlanInputs:
    """Deal the items of encoder `module` to its dp ranks, and map their rows on both sides.

    dp_of, start: by sample, its dp rank of the language model and its first token in the packed sequence.
    tokens: by dp rank of the language model, the length of its packed sequence.
    """
    use, llm = inputs.encoders[module], inputs.llm
    found: list[tuple[int, Part, int, int]] = []  # (sample, part, rows, position)
    for j, sample in enumerate(samples):
        at = start[j] + 1
        for seg in sample.segments:
            if seg.part is None:
                at += seg.text_bytes
                continue
            n = inputs.rows(seg.kind, seg.part)
            if seg.kind == module:
                found.append((j, seg.part, n, at))
            at += n
    costs = [float(use.cls.cost(use.cfg, part.meta)) for _, part, _, _ in found]
    # Samples go to the encoder's dp ranks as to the language model's: equal dp sizes need no traffic.
    home = owner_of(len(samples), use.layout.dp)
    homes = [home[j] for j, *_ in found]
    dealt = deal_by_cost(costs, homes, use.layout.dp) if use.deal == "cost" else homes
    items = tuple(
        ItemPlan(sample=j, part=part, rows=n, cost=cost, llm_dp=dp_of[j], position=at, source_dp=source_dp)
        for (j, part, n, at), cost, source_dp in zip(found, costs, dealt, strict=True)
    )
    rows, llm_dp, position = _columns(items)
    source = source_side(use.layout, rows, dealt)
    dest = dest_side(llm, rows, llm_dp, position, tokens, order=inputs.order)
    imbalance = Imbalance(
        dealt=_imbalance(costs, dealt, use.layout.dp), by_sample=_imbalance(costs, homes, use.layout.dp)
    )
    return EdgePlanInputs(items, source, dest, imbalance)


def _columns(items: Sequence[ItemPlan]) -> tuple[list[int], list[int], list[int]]:
    """Rows, dp ranks of the language model and token positions of items."""
    return [i.rows for i in items], [i.llm_dp for i in items], [i.position for i in items]


def _imbalance(costs: Sequence[float], dp_of: Sequence[int], dp: int) -> float:
    """Largest load of `dp` ranks over their mean load; 1 where there is no load."""
    load = np.bincount(np.asarray(dp_of, dtype=np.int64), weights=np.asarray(costs), minlength=dp)
    return float(load.max() / load.mean()) if load.sum() > 0 else 1.0


def edge_row_positions(
    edge: EdgePlanInputs, inputs: PlanInputs, rank: int, tokens: Sequence[int]
) -> np.ndarray:
    """Token positions, in the share of the language model's `rank`, of its boundary rows in their local
    order; int64 [R]."""
    return row_positions(inputs.llm, rank, *_columns(edge.items), tokens, order=inputs.order)
