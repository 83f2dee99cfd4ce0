"""Megatron-LM with Transformer Engine, as published runs used it: what a step computes, sends and holds.

Counts of this program in the place of ours, with what the layout, the samples and the weights say unchanged.
What it does otherwise is in configs/engines/megatron.yaml, each figure with its source:

- Kernels are fused, gradients of weights are summed in float32 inside the products.
- Of tp and cp messages a share is hidden behind products; without sequence parallelism none is.
- An encoder is not split over cp: each of these ranks computes the same items.
- Each rank of the language model receives all rows of its samples, not those that it reads.
- The head is computed for all tokens.
- With pipeline stages an encoder on the language model's ranks computes the whole batch first (three phases).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from encoders.vit import ViTConfig
from mm.config.build import build
from mm.config.outline import SINK
from mm.config.training import recomputed
from mm.errors import Refused
from mm.plan.blueprint import Blueprint
from mm.plan.step_plan import StepPlan
from mm.predict.count.weights import owned
from mm.predict.work import Counts, Held, Kernel, Message, Work
from parallel.schedule.action import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Kind
from parallel.topology.groups import Group
from parallel.topology.stage import Stage

FILE = Path(__file__).resolve().parents[2] / "configs" / "engines" / "megatron.yaml"
HALF = 2  # bytes of bfloat16
Pair = tuple[float, float]  # of a forward and of a backward


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that a rank holds.

    whole, split: of a layer's activations, by token and feature: what tp splits with sequence parallelism
        alone, and in any case. logits: of each. reserved: of what no tensor gets.
    weights, gradients: of a parameter on each data rank. stored, moments: of one in a shard.
    """

    whole: float
    split: float
    weights: float
    gradients: float
    stored: float
    moments: float
    logits: float
    reserved: float
    source: str


@dataclass(frozen=True)
class MovedBytes:
    """Bytes that fused kernels read and write, by token and feature of a layer: forward, backward. update: by
    parameter of a shard."""

    whole: Pair
    split: Pair
    logits: Pair
    update: float
    source: str


@dataclass(frozen=True)
class Exposed:
    """Share of the messages of an axis that no product hides."""

    tp: float
    cp: float
    source: str


@dataclass(frozen=True)
class Engine:
    """How a program holds, moves and overlaps."""

    name: str
    held: HeldBytes
    moved: MovedBytes
    overlap: Exposed


@cache
def megatron() -> Engine:
    """The engine of configs/engines/megatron.yaml."""
    engine: Engine = build(Engine, yaml.safe_load(FILE.read_text()), "")
    return engine


class Part(NamedTuple):
    """What one rank computes of a module in a micro-batch.

    tokens: on the rank before tp splits them. lengths: of the sequences that attend to themselves, on all
    cp ranks. width, hidden, heads, head_dim: of a layer. layers: attention and MLP layers here.
    """

    module: str
    tokens: float
    lengths: tuple[float, ...]
    width: int
    hidden: int
    heads: tuple[int, int, int]  # of queries, of keys, and their width
    layers: tuple[int, int]
    tp: int
    cp: int
    sequence: bool
    causal: bool
    gated: bool = False  # whether an MLP has a gate

    @property
    def states(self) -> float:
        """Elements of hidden states on this rank."""
        return self.tokens * self.width

    @property
    def whole(self) -> float:
        """What divides the parts of a layer that tp splits with sequence parallelism alone."""
        return self.tp if self.sequence else 1


def as_megatron(blueprint: Blueprint, plan: StepPlan, counts: Counts, engine: Engine) -> Counts:
    """The counts of a step of the same job under Megatron-LM.

    Raises Refused for models that it is not described for.
    """
    work = dict(counts.work)
    kept, rows, moved, held = dict(counts.kept), dict(counts.rows), dict(counts.moved), dict(counts.held)
    load = dict(counts.load)
    for m in blueprint.modules:
        temporary: dict[int, float] = {}
        for s, stage in enumerate(blueprint.stages[m]):
            part = _part(blueprint, plan, m, stage)
            again = "full" in recomputed(blueprint.cfg.train, m)
            forward, backward = _layers(part, engine)
            ends = _ends(blueprint, plan, m, stage, part)
            forward, backward = _joined(forward, ends[0]), _joined(backward, ends[1])
            work[m, s, FORWARD] = forward
            work[m, s, BACKWARD] = _joined(_layers(part, engine)[0], backward) if again else backward
            work[m, s, BACKWARD_INPUT] = work[m, s, BACKWARD_WEIGHT] = Work()
            kept[m, s] = _kept(part, engine, again)
            temporary[s] = _temporary(blueprint, part, stage, engine, again)
            messages, states, update = _states(blueprint, m, s, engine)
            moved[m, s, Kind.GATHER], moved[m, s, Kind.GRAD_SYNC] = messages
            work[m, s, Kind.OPTIMIZER] = update
            pp = s % blueprint.layouts[m].pp
            held[m, pp] = _added(held[m, pp], states, temporary[s], first=s < blueprint.layouts[m].pp)
        if m != SINK:
            load |= {(m, k): 1.0 for (name, k) in load if name == m}
    for edge in blueprint.edges:
        rows[edge.source, edge.stage] = _received(blueprint, plan, edge.source)
    return replace(counts, work=work, kept=kept, rows=rows, moved=moved, held=held, load=load)


def _part(blueprint: Blueprint, plan: StepPlan, module: str, stage: Stage) -> Part:
    layout, n = blueprint.layouts[module], len(plan.microbatches)
    count = stage.stop - stage.start
    if module == SINK:
        llm = blueprint.llm
        symbols = llm.symbols[stage.start : stage.stop]
        if set(symbols) - {"*", "-"} or llm.kv_rank is not None:
            raise Refused(
                "run.engine=megatron is described for dense language models, whose pattern has * and - "
                f"alone; given: {llm.pattern!r}; nearest: run.engine=polyrank"
            )
        dp = max(range(layout.dp), key=lambda d: sum(mb.tokens[d] for mb in plan.microbatches))
        tokens = sum(mb.tokens[dp] for mb in plan.microbatches) / n
        one = plan.microbatches[0]
        return Part(
            module,
            tokens / layout.cp,
            tuple(float(one.length[j]) for j in one.samples_of(dp)),
            width=llm.d_model,
            hidden=llm.mlp_ffn,
            heads=(llm.n_heads, llm.n_kv_heads, llm.head_dim),
            layers=(symbols.count("*"), symbols.count("-")),
            tp=layout.tp,
            cp=layout.cp,
            sequence=layout.sequence_parallel and layout.tp > 1,
            causal=True,
            gated=llm.mlp_gated,
        )
    use = blueprint.inputs.encoders[module]
    if not isinstance(use.cfg, ViTConfig):
        raise Refused(
            f"run.engine=megatron is described for the encoder vit; given: model.{module}.encoder="
            f"{blueprint.cfg.model[module].encoder}; nearest: run.engine=polyrank"
        )
    lengths = _items(blueprint, plan, module)
    cfg = use.cfg
    return Part(
        module,
        sum(lengths),
        tuple(lengths),
        width=cfg.width,
        hidden=cfg.mlp,
        heads=(cfg.heads, cfg.heads, cfg.width // cfg.heads),
        layers=(count, count),
        tp=layout.tp,
        cp=1,
        sequence=layout.sequence_parallel and layout.tp > 1,
        causal=False,
    )


def _items(blueprint: Blueprint, plan: StepPlan, module: str) -> list[float]:
    """Tokens of the items of one dp rank in a micro-batch: the whole batch is dealt at once in three phases,
    else each micro-batch."""
    layout, n, items = blueprint.layouts[module], len(plan.microbatches), plan.items[module].columns.own_rows
    unit = blueprint.inputs.encoders[module].cls.tokens_per_row(blueprint.inputs.encoders[module].cfg)
    if not len(items):
        return []
    mean = float(items.mean()) * unit
    if blueprint.schedule(plan.active).kind == "three_phase":
        share = -(-len(items) // layout.dp) / n
        return [mean] * int(share) + ([mean * (share % 1)] if share % 1 else [])
    return [mean] * -(-len(items) // (layout.dp * n))


def _layers(part: Part, engine: Engine) -> tuple[Work, Work]:
    """Forward and backward of a stage's layers."""
    t, h, tp = part.tokens, part.width, part.tp
    attention, mlp = part.layers
    q, kv, dim = part.heads
    sizes = [(attention, (q + 2 * kv) * dim // tp, h), (attention, h, q * dim // tp)]
    sizes += [(mlp, part.hidden * (1 + part.gated) // tp, h), (mlp, h, part.hidden // tp)]
    out = []
    for back in (False, True):
        moved = _moved(part, engine, back) / 2
        kernels = [Kernel("memory", (), "", 0.0, moved, attention + mlp)]
        for times, n, k in sizes:
            kernels += _products((t, n, k), times, back)
            if back:  # sums of gradients are read and written
                kernels.append(Kernel("memory", (), "", 0.0, 2 * engine.held.gradients * n * k, times))
        kernels.append(_attention(part, back))
        out.append(Work(tuple(k for k in kernels if k.times), tuple(_messages(part, engine, back))))
    return out[0], out[1]


def _moved(part: Part, engine: Engine, back: bool) -> float:
    whole, split = engine.moved.whole[back], engine.moved.split[back]
    return part.states * (whole / part.whole + split / part.tp)


def _products(size: tuple[float, float, float], times: float, back: bool) -> list[Kernel]:
    """y = x w of m rows: forward, or the gradients of x and of w."""
    m, n, k = (int(x) for x in size)
    shapes = [(m, k, n), (k, n, m)] if back else [(m, n, k)]
    moved = HALF * (m * n + n * k + k * m)
    return [Kernel("product", shape, "bfloat16", 2.0 * m * n * k, moved, times) for shape in shapes]


def _attention(part: Part, back: bool) -> Kernel:
    """Flash attention, causal or not: two products forward, five backward (arXiv 2205.14135)."""
    heads, _, dim = part.heads
    pairs = sum(n * n for n in part.lengths) / (2 if part.causal else 1) / part.cp
    flops = (5 if back else 2) * 2 * pairs * heads * dim / part.tp
    # Over cp a sequence is in 2 cp pieces, and each kernel computes one of them with another.
    longest = max(part.lengths, default=0) / (2 * part.cp if part.cp > 1 else 1)
    shape = (heads // part.tp, int(longest), int(longest), dim)
    moved = (8 if back else 4) * HALF * part.tokens * heads * dim / part.tp
    return Kernel("attention", shape, "bfloat16", flops, moved, part.layers[0])


def _messages(part: Part, engine: Engine, back: bool) -> Iterable[Message]:
    """Of tp: with sequence parallelism a gather and a sum into shards around each pair of products, and what
    entered is gathered again for the gradients of weights; else a sum. Of cp: keys and values."""
    layers, size = sum(part.layers), part.states * HALF
    group = Group("module", part.module, "tp")
    if part.tp > 1 and part.sequence:
        exposed = engine.overlap.tp * layers
        yield Message("all_gather", group, size, exposed * (2 if back else 1))
        yield Message("reduce_scatter", group, size, exposed)
    elif part.tp > 1:
        yield Message("all_reduce", group, size, layers)
    if part.cp > 1:
        keys = part.tokens * part.cp * 2 * part.heads[1] * part.heads[2] / part.tp * HALF
        times = engine.overlap.cp * part.layers[0] * (2 if back else 1)
        yield Message("all_gather", Group("module", part.module, "cp"), keys, times)


def _ends(blueprint: Blueprint, plan: StepPlan, module: str, stage: Stage, part: Part) -> tuple[Work, Work]:
    """What a stage computes beside layers, forward and backward: the head and its loss, the projector."""
    out: list[list[Kernel]] = [[], []]
    d, tp = blueprint.llm.d_model, part.tp
    if module == SINK and stage.last:
        vocab = blueprint.llm.vocab_size // tp
        for back in (0, 1):
            out[back] += _products((part.tokens, vocab, d), 1, bool(back))
            moved = megatron().moved.logits[back] * part.tokens * vocab
            out[back].append(Kernel("memory", (), "", 0.0, moved, 1))
    elif module != SINK and stage.last:
        use, projector = blueprint.inputs.encoders[module], blueprint.cfg.model[module].projector
        rows = part.tokens / use.cls.tokens_per_row(use.cfg)
        features, hidden = use.cls.feature_width(use.cfg), projector.hidden // tp
        for back in (0, 1):
            out[back] += _products((rows, hidden, features), 1, bool(back))
            out[back] += _products((rows, d, hidden), 1, bool(back))
    return Work(tuple(out[0])), Work(tuple(out[1]))


def _joined(*works: Work) -> Work:
    return Work(sum((w.kernels for w in works), ()), sum((w.messages for w in works), ()))


def _kept(part: Part, engine: Engine, again: bool) -> float:
    """Bytes of activations of a micro-batch: all of a layer's, or what enters it."""
    layers = sum(part.layers) / 2
    if again:
        return part.states * HALF * layers / part.whole
    return part.states * layers * (engine.held.whole / part.whole + engine.held.split / part.tp)


def _temporary(blueprint: Blueprint, part: Part, stage: Stage, engine: Engine, again: bool) -> float:
    """The most that an action needs beside what it keeps: of a layer that is computed again, the gathered
    input and gradients of one that is not, the logits."""
    layer = part.states * (engine.held.whole / part.whole + engine.held.split / part.tp) * again
    most = layer + part.states * HALF * 3
    if part.module == SINK and stage.last:
        most += part.tokens * blueprint.llm.vocab_size / part.tp * engine.held.logits
    return most


def _states(
    blueprint: Blueprint, module: str, s: int, engine: Engine
) -> tuple[tuple[tuple[Message, ...], tuple[Message, ...]], Held, Work]:
    """Of a stage's weights: gathers and sums over data ranks, what a rank holds of them, their update."""
    layout, held = blueprint.layouts[module], engine.held
    shards = max(1, layout.dp * layout.cp)
    units = [o.unit for o in owned(blueprint, module, s)]
    count = float(sum(u.whole.every for u in units))
    group = Group("module", module, "data")
    gather = (Message("all_gather", group, count * held.weights),) if shards > 1 else ()
    added = (Message("reduce_scatter", group, count * held.gradients),) if shards > 1 else ()
    own = count / shards
    states = Held(own * held.stored, own * held.moments, count * held.weights, count * held.gradients, 0.0)
    update = Work((Kernel("memory", (), "", 0.0, own * engine.moved.update),))
    return (gather, added), states, update


def _added(before: Held, more: Held, temporary: float, *, first: bool) -> Held:
    if first:
        return replace(more, temporary=temporary)
    return Held(
        before.parameters + more.parameters,
        before.optimizer + more.optimizer,
        before.gathered + more.gathered,
        before.gradients + more.gradients,
        max(before.temporary, temporary),
    )


def _received(blueprint: Blueprint, plan: StepPlan, module: str) -> float:
    """Bytes of the rows of a micro-batch's samples on a rank of the language model: all of them."""
    columns, n = plan.items[module].columns, len(plan.microbatches)
    per = float(columns.rows.sum()) / (n * blueprint.layouts[SINK].dp)
    return per * blueprint.llm.d_model * HALF
