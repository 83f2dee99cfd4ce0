"""What a schedule cannot do, said with the numbers and the nearest choice that works."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from parallel.layout import Layout
from parallel.schedule.orders import PIPELINES, ROUNDS
from parallel.schedule.plan import ModuleUse

KINDS = ("auto", *PIPELINES)


def check_modules(
    modules: Mapping[str, ModuleUse],
    sink: str,
    active: Sequence[Collection[str]],
    batch: Mapping[str, int],
) -> None:
    """Refuse a graph that no schedule can serve."""
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
        layout = use.layout
        if use.layers is not None and use.stages > use.layers:
            given = f"pp={layout.pp}" + (f" x vpp={layout.vpp}" if layout.vpp > 1 else "")
            works = f"pp={layout.pp}, vpp={use.layers // layout.pp}"
            if use.layers // layout.pp < 2:
                pps = [d for d in range(1, use.layers + 1) if layout.size % d == 0]
                works = f"pp={min(layout.pp, max(pps))}" + (", vpp=1" if layout.vpp > 1 else "")
            raise ValueError(
                f"layout.{name}: {given} makes {use.stages} stages, but it has {use.layers} layers; "
                f"needed: at most one stage a layer. Nearest: {works}"
            )
        if name != sink and layout.vpp > 1:
            raise ValueError(
                f"layout.{name}: vpp={layout.vpp}, but only the language model has virtual stages; nearest: "
                f"vpp=1, or pp={layout.pp * layout.vpp} on more ranks"
            )
        beyond = [s for s in use.enters if not 0 <= s < modules[sink].stages]
        if name != sink and (beyond or len(set(use.enters)) < len(use.enters) or not use.enters):
            raise ValueError(
                f"rows of {name} enter stages {list(use.enters)} of {sink}; needed: some of 0-"
                f"{modules[sink].stages - 1}, each once"
            )
        if batch.get(name, 1) < 1:
            raise ValueError(f"batch of {name} is {batch[name]} micro-batches; needed: at least 1")


def check_fill(modules: Mapping[str, ModuleUse], sink: str) -> None:
    """Refuse encoders whose work cannot be at different times on different ranks of the sink's pipeline."""
    ranks, pp = set(modules[sink].layout.ranks), modules[sink].layout.pp
    if pp == 1:
        raise ValueError(
            f"schedule.kind fill uses the idle time of a pipeline, given layout.{sink}.pp=1, which has none; "
            f"nearest: schedule.kind=auto"
        )
    stage_of = {r: k for k in range(pp) for r in modules[sink].layout.stage_ranks(k)}
    for name, use in modules.items():
        if name == sink:
            continue
        if set(use.layout.ranks) != ranks or use.layout.pp > 1:
            raise ValueError(
                f"schedule.kind fill needs every encoder on the ranks of {sink} with pp=1, given {name} on "
                f"{list(use.layout.ranks)} with pp={use.layout.pp}; nearest: schedule.kind=auto"
            )
        if use.params == "each" and use.layout.dp > 1:
            raise ValueError(
                f"schedule.kind fill computes {name} at different times on different pipeline ranks, but its "
                f"parameters are gathered over dp in each forward and backward; needed: parameters gathered "
                f"once a step, or replicated. Nearest: params=step, or schedule.kind=auto"
            )
        for axis in ("tp", "cp", "ep", "etp"):
            across = [g for g in use.layout.groups(axis) if len({stage_of[r] for r in g}) > 1]
            if across:
                raise ValueError(
                    f"schedule.kind fill: layout.{name}.{axis}={getattr(use.layout, axis)} joins ranks "
                    f"{list(across[0])} of different pipeline ranks of {sink}; needed: at most "
                    f"{len(ranks) // pp} ranks in a row. Nearest: {axis}=1, or schedule.kind=auto"
                )


def resolve(kind: str, layout: Layout, microbatches: int) -> str:
    """The schedule that `kind` means for a sink of this layout."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        raise ValueError(
            f"schedule.kind: given {kind!r}; known: {', '.join(KINDS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if kind == "auto":
        kind = "interleaved" if layout.vpp > 1 else "1f1b"
    if kind in ("1f1b", "three_phase") and layout.vpp > 1:
        raise ValueError(
            f"schedule.kind {kind} runs one stage a rank, given layout.{layout.module}.vpp={layout.vpp}; "
            f"nearest: schedule.kind=interleaved, or vpp=1"
        )
    if kind == "interleaved" and layout.vpp == 1:
        raise ValueError(
            f"schedule.kind interleaved needs virtual stages, given layout.{layout.module}.vpp=1; nearest: "
            f"schedule.kind=1f1b, or vpp=2"
        )
    if kind in ROUNDS and layout.vpp > 1 and microbatches % layout.pp:
        below, above = microbatches // layout.pp * layout.pp, -(-microbatches // layout.pp) * layout.pp
        works = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)
        raise ValueError(
            f"schedule.kind {kind} with vpp={layout.vpp} passes micro-batches on in rounds of "
            f"pp={layout.pp}; needed: a multiple of {layout.pp}, given {microbatches}. Nearest: {works} "
            f"micro-batches, or vpp=1"
        )
    return kind


def check_ahead(ahead: int, quantum: int, unit: int) -> int:
    """The window of micro-batches that a bound of `ahead` allows; refused where it is none.

    quantum: a window is a multiple of it.
    """
    if ahead < quantum:
        why = (
            f"encoders take {unit} at once" if unit == quantum else f"virtual stages need rounds of {quantum}"
        )
        raise ValueError(
            f"schedule.ahead={ahead}: encoder activations of at most so many micro-batches may be held, but "
            f"{why}; needed: at least {quantum}. Nearest: {quantum}"
        )
    return ahead // quantum * quantum
