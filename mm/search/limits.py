"""The space of a job: which degrees its modules allow, from the model, the data and the nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from llm.checks import check
from llm.recompute import recompute_parts
from mm.config.outline import recomputable
from mm.plan.blueprint import Blueprint
from mm.search.candidate import Block, Degrees
from mm.search.space import Limits, Space

MOST_CP, LEAST_TOKENS = 16, 128  # ranks along cp, and tokens that each of them has of the longest sample
MOST_PP, MOST_VPP, MOST_EP = 16, 2, 128


def space_of(blueprint: Blueprint) -> Space:
    """The candidates for a job. Degrees are powers of two; tp and etp stay inside a node."""
    cfg, world = blueprint.cfg, blueprint.world
    node = blueprint.node_size or world
    llm = blueprint.llm
    experts = "E" in llm.kinds
    stages = llm.pattern.count("|") + 1
    sink = Limits(
        tp=_fitting(powers(node), lambda tp: check(llm, tp)),
        cp=tuple(
            n for n in powers(min(MOST_CP, world)) if n * LEAST_TOKENS <= max(cfg.data.context, LEAST_TOKENS)
        ),
        pp=_pipeline(min(world, MOST_PP), stages),
        vpp=powers(MOST_VPP),
        ep=_fitting(powers(min(MOST_EP, world)), lambda ep: check(llm, 1, ep)) if experts else (1,),
        etp=_fitting(powers(min(node, 4)), lambda etp: check(llm, 1, 1, etp)) if experts else (1,),
        layers=len(llm.symbols),
        stages=stages if stages > 1 else None,
    )
    own = tuple(sorted(recompute_parts(cfg.train.recompute)))
    selected = tuple(sorted(recomputable(llm) - {"full"}))  # of layers of which more is kept
    return Space(
        world=world,
        node=node,
        sink=sink,
        encoders={m: _encoder(blueprint, m, node) for m in cfg.model},
        batch=cfg.train.global_batch,
        recompute=tuple(dict.fromkeys([(), ("norm",), selected, ("full",), own])),
        own_microbatches=cfg.schedule.microbatches,
        hsdp=_hsdp(blueprint.node_size),
    )


def powers(most: int) -> tuple[int, ...]:
    """1, 2, 4 .. up to `most`."""
    return tuple(2**k for k in range(most.bit_length()) if 2**k <= most)


def _pipeline(most: int, stages: int) -> tuple[int, ...]:
    """Pipeline ranks; of a model whose pattern fixes its stages the divisors of these. Ranks that encoders of
    their own leave are seldom a power of two: 960 are three pipeline ranks of 320."""
    if stages == 1:
        return tuple(range(1, most + 1))
    return tuple(n for n in range(1, most + 1) if stages % n == 0)


def _fitting(degrees: Iterable[int], check_one: Callable[[int], object]) -> tuple[int, ...]:
    found = []
    for n in degrees:
        try:
            check_one(n)
        except ValueError:
            continue
        found.append(n)
    return tuple(found) or (1,)


def _encoder(blueprint: Blueprint, module: str, node: int) -> Limits:
    use = blueprint.inputs.encoders[module]
    cls, layers = use.cls, blueprint.stages[module][-1].stop
    # Without support a module runs whole on each tp rank, which only a homogeneous layout wants.
    tp = _fitting(powers(node), lambda n: cls.check(use.cfg, n)) if cls.tensor_parallel else powers(node)
    return Limits(
        tp=tp,
        cp=powers(min(MOST_CP, blueprint.world)) if cls.context_parallel else (1,),
        pp=powers(min(MOST_PP, layers, blueprint.world)) if cls.pipeline else (1,),
        layers=layers,
    )


def _hsdp(node: int | None) -> Callable[[Block, Degrees], bool]:
    """Whether each node has several data ranks, and not all of them (shards_of() refuses hsdp else)."""

    def fits(block: Block, degrees: Degrees) -> bool:
        if node is None or block.size <= node or node % degrees.tp:
            return False
        n = degrees.dp(block.size) * degrees.cp
        within = math.gcd(n, node // degrees.tp)
        return 1 < within < n

    return fits
