"""A candidate in the making: what is wanted of it, and the nearest to that in the space. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mm.config.outline import SINK
from mm.search.candidate import Candidate, Choice, Degrees
from mm.search.space import FIRST, WITH, Frame, Space
from parallel.topology.layout import DEGREES

# Of cp and etp, which cost most where they are not wanted: times as far as a factor of two in another degree.
FAR = 3.0


class Sketch(NamedTuple):
    """What is wanted. encoders: degrees and data-parallel policy of each, in the space's order."""

    frame: Frame
    degrees: Degrees
    data_parallel: str
    kind: str
    microbatches: int
    again: tuple[str, ...]
    encoders: tuple[tuple[Degrees, str], ...]

    def follows(self) -> Sketch:
        """With the encoders in the language model's degrees (Candidate.homogeneous)."""
        d = self.degrees
        found = []
        for where, (_, policy) in zip(self.frame.encoders, self.encoders, strict=True):
            pp = d.pp if where == WITH else 1
            found.append((Degrees(d.tp, d.cp, pp, sequence_parallel=d.tp > 1), policy))
        return self._replace(encoders=tuple(found))


def nearest(space: Space, wanted: Sketch) -> Candidate | None:
    """The candidate of the space that is nearest to what is wanted; None where nothing is near."""
    frame, sink = wanted.frame, wanted.frame.sink
    every = [d for d in space.sink_degrees(sink.size) if d.pp > 1 or FIRST not in frame.encoders]
    degrees = _closest(wanted.degrees, every)
    if degrees is None:
        return None
    kinds, policies = space.kinds(frame, degrees), space.policies(sink, degrees)
    kind = wanted.kind if wanted.kind in kinds else kinds[0]
    policy = wanted.data_parallel if wanted.data_parallel in policies else policies[-1]
    numbers = space.microbatches(degrees.dp(sink.size), degrees.pp)
    m = max((n for n in numbers if n <= wanted.microbatches), default=numbers[0])
    choices = []
    for module, where, (theirs, own) in zip(space.encoders, frame.encoders, wanted.encoders, strict=True):
        stage = sink.size // degrees.pp if kind == "fill" and isinstance(where, str) else None
        options = space.choices(module, space.block(where, sink, degrees), stage)
        at = _closest(theirs, [c.degrees for c in options])
        if at is None:
            return None
        same = [c for c in options if c.degrees == at]
        choices.append((module, next((c for c in same if c.data_parallel == own), same[-1])))
    choices.append((SINK, Choice(sink, degrees, policy)))
    return Candidate(space.world, tuple(choices), kind, m, wanted.again)


def sketch_of(frame: Frame, of: Candidate) -> Sketch:
    """What a candidate is."""
    encoders = tuple((c.degrees, c.data_parallel) for m, c in of.choices if m != SINK)
    sink = of.sink
    return Sketch(
        frame,
        sink.degrees,
        sink.data_parallel,
        of.kind,
        microbatches=of.microbatches,
        again=of.recompute,
        encoders=encoders,
    )


def _closest(wanted: Degrees, every: Iterable[Degrees]) -> Degrees | None:
    """Of some degrees those that differ by the fewest factors of two, the first of equals."""
    every = list(every)
    return wanted if wanted in every else min(every, key=lambda d: far(d, wanted), default=None)


def far(one: Degrees, other: Degrees) -> float:
    """By how many factors of two degrees differ."""
    steps = {a: abs(math.log2(getattr(one, a) / getattr(other, a))) for a in DEGREES}
    return sum(n * (FAR if a in ("cp", "etp") else 1.0) for a, n in steps.items())


def moves(space: Space, of: Sketch) -> Iterator[tuple[str, Sketch]]:
    """Sketches that differ in one thing, or in two that go together, each with what differs: those that
    change most come first."""
    for factor in (0.5, 2.0):
        yield f"microbatches {factor}", of._replace(microbatches=max(1, int(of.microbatches * factor)))
    for again in space.recompute:
        yield f"recompute {again}", of._replace(again=again)
    for name in ("tp", "pp", "ep"):
        for step in (-1, 1):
            yield from _sink_moves(space, of, {name: step})
    for step in (-1, 1):
        yield from _sink_moves(space, of, {"tp": step, "pp": -step})
        yield from _sink_moves(space, of, {"pp": step, "ep": -step})
        for name, moved in _sink_moves(space, of, {"pp": step}):
            yield f"{name} m", moved._replace(microbatches=max(1, int(of.microbatches * 2.0**step)))
    for policy in ("step", "zero3", "hsdp"):
        yield f"policy {policy}", of._replace(data_parallel=policy)
    for kind in ("1f1b", "zero_bubble", "interleaved", "fill"):
        yield f"kind {kind}", of._replace(kind=kind)
    yield from _frame_moves(space, of)
    for i, module in enumerate(space.encoders):
        yield from _encoder_moves(space, of, i, module)
    for name in ("vpp", "etp", "cp"):
        for step in (-1, 1):
            yield from _sink_moves(space, of, {name: step})


def _sink_moves(space: Space, of: Sketch, steps: dict[str, int]) -> Iterator[tuple[str, Sketch]]:
    degrees = of.degrees
    for name, step in steps.items():
        divide = tuple(n for n in getattr(space.sink, name) if of.frame.sink.size % n == 0)
        value = _next(divide, getattr(of.degrees, name), step)
        if value is None:
            return
        degrees = with_degree(degrees, name, value)
    yield f"llm {steps}", of._replace(degrees=degrees)


def _encoder_moves(space: Space, of: Sketch, i: int, module: str) -> Iterator[tuple[str, Sketch]]:
    degrees, policy = of.encoders[i]

    def with_(own: tuple[Degrees, str]) -> Sketch:
        return of._replace(encoders=(*of.encoders[:i], own, *of.encoders[i + 1 :]))

    for other in ("step", "zero3", "hsdp"):
        yield f"{module} {other}", with_((degrees, other))
    for name in ("tp", "pp", "cp"):
        for step in (-1, 1):
            value = _next(getattr(space.encoders[module], name), getattr(degrees, name), step)
            if value is not None:
                yield f"{module} {name} {step}", with_((with_degree(degrees, name, value), policy))


def with_degree(degrees: Degrees, name: str, value: int) -> Degrees:
    """Degrees with another one; sequence parallelism goes with tp."""
    found = Degrees(**{**degrees._asdict(), name: value})
    return found._replace(sequence_parallel=found.tp > 1)


def _frame_moves(space: Space, of: Sketch) -> Iterator[tuple[str, Sketch]]:
    """Frames in which one encoder is elsewhere, or ranks of their own are the next more or fewer."""
    sizes = (0, *space.block_sizes)
    mine = _placed(of.frame)
    for frame in space.frames:
        differs = [(a, b) for a, b in zip(mine, _placed(frame), strict=True) if a != b]
        if len(differs) != 1:
            continue
        (a, b) = differs[0]
        if isinstance(a, int) and isinstance(b, int) and abs(sizes.index(a) - sizes.index(b)) > 1:
            continue
        yield f"placement {b}", of._replace(frame=frame)


def _placed(frame: Frame) -> list[int | str]:
    """Where each encoder is: how many ranks of its own; 0 on those of the one before."""
    out: list[int | str] = []
    before = None
    for where in frame.encoders:
        out.append(where if isinstance(where, str) else 0 if where == before else where.size)
        before = where if not isinstance(where, str) else before
    return out


def _next(values: tuple[int, ...], now: int, step: int) -> int | None:
    """The next value below or above."""
    order = sorted({*values, now})
    at = order.index(now) + step
    return order[at] if 0 <= at < len(order) else None
