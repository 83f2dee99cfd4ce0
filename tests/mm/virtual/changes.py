"""Traces with one call changed, as a fault of one rank would change it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mm.virtual.records import Call, Trace

EACH = 6  # traces of each change


def changes(trace: Trace, rng: np.random.Generator) -> Iterator[Trace]:
    """The trace with a collective left out, made twice as large, of another operation or dtype, or exchanged
    with the next one of its communicator that is not equal; EACH of each, drawn by `rng`."""
    spots = [k for k, c in enumerate(trace.calls) if c.peer is None and not c.sends]
    split = [k for k, c in enumerate(trace.calls) if sum(c.sends)]
    for k in _some(spots, rng):
        call = trace.calls[k]
        other = "all_gather" if call.op == "all_reduce" else "all_reduce"
        for change in ({"bytes": 2 * call.bytes + 1}, {"op": other}, {"dtype": "int8"}):
            yield _with(trace, k, replace(call, **change))  # type: ignore[arg-type]
        yield without(trace, k)
        swapped = _swapped(trace, k)
        if swapped is not None:
            yield swapped
    for k in _some(split, rng):
        call = trace.calls[k]
        at = int(np.argmax(call.sends))
        sends = tuple(n - 1 if i == at else n for i, n in enumerate(call.sends))
        yield _with(trace, k, replace(call, sends=sends))


def _some(spots: list[int], rng: np.random.Generator) -> list[int]:
    return sorted(map(int, rng.permutation(spots)[:EACH]))


def _with(trace: Trace, k: int, call: Call) -> Trace:
    return replace(trace, calls=(*trace.calls[:k], call, *trace.calls[k + 1 :]))


def without(trace: Trace, k: int) -> Trace:
    """The trace without call k, and without the wait for it."""
    waits = tuple((at, n - (n > k)) for at, n in trace.waits if n != k)
    return replace(trace, calls=(*trace.calls[:k], *trace.calls[k + 1 :]), waits=waits)


def _swapped(trace: Trace, k: int) -> Trace | None:
    """The trace with call k and the next one of its communicator in each other's place."""
    first = trace.calls[k]
    for n in range(k + 1, len(trace.calls)):
        second = trace.calls[n]
        if second.communicator == first.communicator:
            if (first.op, first.bytes, first.dtype) == (second.op, second.bytes, second.dtype):
                return None
            calls = list(trace.calls)
            calls[k], calls[n] = replace(second, at=first.at), replace(first, at=second.at)
            return replace(trace, calls=tuple(calls))
    return None
