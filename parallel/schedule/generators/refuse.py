"""Refusals of what no schedule can do, with the numbers and the nearest choice that works."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from parallel.schedule.generators.orders import PAIRED, PIPELINES
from parallel.schedule.plan import ModuleUse, parameter_groups
from parallel.topology.layout import Changes, Layout, Unfit, nearest_degrees

KINDS = ("auto", *PIPELINES)
AUTO = {"schedule.kind": "auto"}
AXES = ("tp", "cp", "ep", "etp")  # along which a computation communicates


def check_modules(
    modules: Mapping[str, ModuleUse],
    sink: str,
    active: Sequence[Collection[str]],
    batch: Mapping[str, int],
) -> None:
    """Refuse modules and micro-batches that no schedule can serve."""
    if sink not in modules:
        raise ValueError(f"the sink {sink!r} is not among the modules {list(modules)}")
    if not active:
        raise ValueError("a step needs at least one micro-batch, given 0")
    for i, present in enumerate(active):
        if unknown := sorted(set(present) - (set(modules) - {sink})):
            raise ValueError(
                f"micro-batch {i} has items of {unknown}; the sources are {sorted(set(modules) - {sink})}"
            )
    for name, use in modules.items():
        check_stages(use.layout, use.layers)
        beyond = [s for s in use.enters if not 0 <= s < modules[sink].stages]
        if name != sink and (beyond or len(set(use.enters)) < len(use.enters) or not use.enters):
            raise ValueError(
                f"rows of {name} enter stages {list(use.enters)} of {sink}; needed: some of 0-"
                f"{modules[sink].stages - 1}, each once"
            )
        if batch.get(name, 1) < 1:
            raise ValueError(f"batch of {name} is {batch[name]} micro-batches; needed: at least 1")


def check_stages(layout: Layout, layers: int | None) -> None:
    """Refuse more stages than layers (None: not known)."""

    def fits(degrees: Mapping[str, int]) -> bool:
        return layers is None or degrees["pp"] * degrees["vpp"] <= layers

    if fits(layout.degrees):
        return
    works = nearest_degrees(layout.size, layout.degrees, fits)
    name, given = layout.module, f"pp={layout.pp}" + (f" x vpp={layout.vpp}" if layout.vpp > 1 else "")
    why = (
        f"layout.{name}: {given} makes {layout.pp * layout.vpp} stages, but it has {layers} layers; "
        f"needed: at most one stage a layer"
    )
    raise Unfit(why, works, name)


def check_fill(modules: Mapping[str, ModuleUse], sink: str) -> None:
    """Refuse encoders that cannot compute at different times on different pipeline ranks of the sink."""
    ranks, pp = set(modules[sink].layout.ranks), modules[sink].layout.pp
    if pp == 1:
        raise Unfit(
            f"schedule.kind fill uses the idle time of a pipeline, given layout.{sink}.pp=1, which has none",
            [AUTO],
        )
    stage_of = {r: k for k in range(pp) for r in modules[sink].layout.stage_ranks(k)}
    for name, use in modules.items():
        if name == sink or not ranks & set(use.layout.ranks):
            continue  # an encoder on other ranks is a pipeline stage ahead
        if not ranks >= set(use.layout.ranks):
            raise Unfit(
                f"schedule.kind fill needs each encoder on ranks of {sink} alone, or on others alone, given "
                f"{name} on {list(use.layout.ranks)} and {sink} on {sorted(ranks)}",
                [AUTO],
            )
        each = [
            what
            for what, moved in (
                ("gathers weights in each forward and backward", use.params == "each"),
                ("sums gradients in each backward", use.sums == "backward" and not use.frozen),
            )
            if moved and parameter_groups(name, use)
        ]
        if each:
            key = f"layout.{name}.data_parallel"
            raise Unfit(
                f"schedule.kind fill computes {name} at different times on different pipeline ranks, but "
                f"{key}={use.layout.data_parallel} {' and '.join(each)}, which data ranks do together; "
                "needed: step, zero1 or replicate",
                [{key: "step"}, AUTO],
            )
        for axis in AXES:
            across = _crosses(use.layout, axis, stage_of)
            if across:
                raise Unfit(
                    f"schedule.kind fill: layout.{name}.{axis}={getattr(use.layout, axis)} joins ranks "
                    f"{list(across[0])} of different pipeline ranks of {sink}; needed: at most "
                    f"{len(ranks) // pp} ranks in a row",
                    [_inside(modules, sink, stage_of), AUTO],
                )


def check_pairs(kind: str, modules: Mapping[str, ModuleUse], sink: str, microbatches: int) -> None:
    """Refuse pairs of a forward and a backward where they are impossible or without effect."""
    key, use = "schedule.overlap_experts", modules[sink]
    if kind not in PAIRED:
        kinds = " or ".join(PAIRED)
        raise Unfit(
            f"{key} pairs a forward and a backward, which schedule.kind {kind} does not; needed: {kinds}",
            [{"schedule.kind": "auto"}, {key: False}],
        )
    if use.layout.ep * use.layout.etp == 1:
        raise Unfit(
            f"{key} has no effect with layout.{sink}.ep=1 and etp=1: no rows are exchanged", [{key: False}]
        )
    if microbatches == 1:
        raise Unfit(
            f"{key} has no effect with schedule.microbatches=1: it needs a forward and a backward of two "
            "micro-batches",
            [{"schedule.microbatches": 2}, {key: False}],
        )
    if use.params == "each":
        policy, several = f"layout.{sink}.data_parallel", bool(parameter_groups(sink, use))
        given = f"{policy}={use.layout.data_parallel}" if several else "one data rank"
        raise Unfit(
            f"{key}: a forward and a backward that take turns need weights that stay whole between them, but "
            f"with {given} each gathers and frees its own; needed: {policy} step, replicate, zero1 or zero2"
            + ("" if several else " on several data ranks"),
            [*([{policy: "step"}] if several else []), {key: False}],
        )


def check_effect(sink: ModuleUse, ahead: int | None) -> None:
    """Refuse a bound under which a pipeline that should have pairs has none. A frozen sink has backwards in
    some steps only."""
    if not sink.frozen:
        key, least = "schedule.overlap_experts", 2 * sink.layout.pp
        raise Unfit(
            f"{key} has no effect with schedule.ahead={ahead}: the two of a pair are of two micro-batches in "
            f"flight; needed: at least 2, best {least}",
            [{"schedule.ahead": least}, {key: False}],
        )


def resolve(kind: str, layout: Layout) -> str:
    """The schedule that `kind` means for a sink of this layout."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        raise ValueError(
            f"schedule.kind: given {kind!r}; known: {', '.join(KINDS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    vpp = layout.vpp
    if kind == "auto":
        return "interleaved" if vpp > 1 else "1f1b"
    if kind == "1f1b" and vpp > 1:
        why = f"schedule.kind 1f1b runs one stage a rank, given layout.{layout.module}.vpp={vpp}"
        raise Unfit(why, [{"schedule.kind": "interleaved"}, {f"layout.{layout.module}.vpp": 1}])
    if kind == "interleaved" and vpp == 1:
        why = f"schedule.kind interleaved needs virtual stages, given layout.{layout.module}.vpp=1"
        raise Unfit(why, [{"schedule.kind": "1f1b"}])
    return kind


def _inside(modules: Mapping[str, ModuleUse], sink: str, stage_of: Mapping[int, int]) -> Changes:
    """The changes that keep every group of the encoders inside a stage of the sink."""
    sources = [(name, use.layout) for name, use in modules.items() if name != sink]
    return {f"layout.{m}.{a}": 1 for m, layout in sources for a in AXES if _crosses(layout, a, stage_of)}


def _crosses(layout: Layout, axis: str, stage_of: Mapping[int, int]) -> list[tuple[int, ...]]:
    """The groups of an axis that join ranks of different stages of the sink."""
    return [g for g in layout.groups(axis) if len({stage_of[r] for r in g}) > 1]


def check_ahead(ahead: int, unit: int) -> int:
    """The largest multiple of `unit` micro-batches within a bound of `ahead`; refused if there is none.

    unit: how many micro-batches encoders take at once.
    """
    if ahead < unit:
        raise Unfit(
            f"schedule.ahead={ahead}: encoder activations of at most so many micro-batches may be held, but "
            f"encoders take {unit} at once; needed: at least {unit}",
            [{"schedule.ahead": unit}],
        )
    return ahead // unit * unit
