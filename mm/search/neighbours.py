"""Candidates that differ from one in one thing: the neighbours in its space, and choices beside that space.
Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mm.config.outline import SINK
from mm.search.candidate import UNSEARCHED, Candidate, Choice
from mm.search.space import Limits, Space


def around(space: Space, of: Candidate) -> Iterator[tuple[str, Candidate]]:
    """All that differ in one thing, each with what differs: choices beside the space first."""
    yield from unsearched(space, of)
    yield from changes(space, of)


def unsearched(space: Space, of: Candidate) -> Iterator[tuple[str, Candidate]]:
    """The same candidate with one choice that the space leaves out."""
    for i, (module, choice) in enumerate(of.choices):
        if len(space.policies(choice.block, choice.degrees)) == 1:
            continue  # of one data rank all policies are one
        for policy in UNSEARCHED:
            if policy != choice.data_parallel:
                changed = choice._replace(data_parallel=policy)
                yield f"{module} data_parallel={policy}", _with(of, i, changed)
    if of.sink.degrees.ep > 1 or of.overlap_experts:
        on = not of.overlap_experts
        yield f"schedule.overlap_experts={str(on).lower()}", replace(of, overlap_experts=on)


def changes(space: Space, of: Candidate) -> Iterator[tuple[str, Candidate]]:
    """The neighbours of a candidate in its space, each with what differs."""
    for i, (module, choice) in enumerate(of.choices):
        limits = space.sink if module == SINK else space.encoders[module]
        for what, degrees in _degrees(limits, choice.block.size, choice.degrees._asdict()):
            changed = choice._replace(degrees=choice.degrees._replace(**degrees))
            yield f"{module} {what}", _with(of, i, changed)
        for policy in space.policies(choice.block, choice.degrees):
            if policy != choice.data_parallel:
                changed = choice._replace(data_parallel=policy)
                yield f"{module} data_parallel={policy}", _with(of, i, changed)
    most = max(space.microbatches(of.sink.dp, of.sink.degrees.pp))
    for n in (of.microbatches // 2, of.microbatches * 2):
        if 1 <= n <= most:
            yield f"schedule.microbatches={n}", replace(of, microbatches=n)
    for again in space.recompute:
        if again != of.recompute:
            what = "+".join(again) or "nothing"
            yield f"recompute {what}", replace(of, recompute=again)
    kinds = ("1f1b", "zero_bubble") if of.sink.degrees.vpp == 1 else ("interleaved", "zero_bubble")
    for kind in kinds:
        if kind != of.kind and of.sink.degrees.pp > 1:
            yield f"schedule.kind={kind}", replace(of, kind=kind)


def _degrees(limits: Limits, size: int, given: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The next value below and above of each degree, where it divides the ranks."""
    for name in ("tp", "cp", "pp", "ep"):
        values = sorted({*getattr(limits, name), given[name]})
        at = values.index(given[name])
        for value in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2]):
            now = {**given, name: value}
            dense, expert = now["tp"] * now["cp"] * now["pp"], now["etp"] * now["ep"] * now["pp"]
            if size % dense or size % expert or now["pp"] * now["vpp"] > limits.layers:
                continue
            if now["pp"] == 1 < now["vpp"]:
                continue
            more = {"sequence_parallel": value > 1} if name == "tp" else {}
            yield f"{name}={value}", {name: value, **more}


def _with(of: Candidate, i: int, choice: Choice) -> Candidate:
    choices = [*of.choices]
    choices[i] = (choices[i][0], choice)
    return replace(of, choices=tuple(choices))
