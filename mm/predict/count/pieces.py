"""A part of a stage as it is counted alone, and parts one after another.

A part owns what enters it: its input counts here if it is kept, its output counts where it enters next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from mm.predict.count.tape import PASSING, Low, Storage, Tape, Var
from mm.predict.work import Kernel, Message, Work
from parallel.schedule.action import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD


class How(NamedTuple):
    """How a module computes. item: bytes of an element. recompute: parts that are computed again. halves:
    whether backwards have two. trains: whether its weights have gradients. below: whether what enters has.
    low: its adapters. host: of Tape."""

    item: int = 2
    recompute: frozenset[str] = frozenset()
    halves: bool = False
    trains: bool = True
    below: bool = True
    low: Low | None = None
    host: bool = False


class Level(NamedTuple):
    """Bytes at a moment: kept from forwards, passing (made in an action and gone after it), gradients of
    weights. done: of these, of experts whose backward is over; ending: whose backward just ends."""

    kept: float = 0.0
    passing: float = 0.0
    gradients: float = 0.0
    done: float = 0.0
    ending: float = 0.0

    @property
    def total(self) -> float:
        """Of all."""
        return self.kept + self.passing + self.gradients

    def plus(
        self, kept: float = 0.0, passing: float = 0.0, gradients: float = 0.0, done: float = 0.0
    ) -> Level:
        """With more of each."""
        return Level(
            self.kept + kept,
            self.passing + passing,
            self.gradients + gradients,
            self.done + done,
            self.ending,
        )


NOTHING = Level()


@dataclass(frozen=True)
class Piece:
    """A part of a stage in one micro-batch.

    forward, backward_input, backward_weight: what is computed and sent. kept: bytes from its forward to its
    backward. later: bytes that BACKWARD_WEIGHT needs, where backwards have halves. gradients: bytes of the
    gradients of its weights, in the dtype that it computes in. in_forward, in_backward: the most while it
    runs, with what it keeps. out: bytes of what it gives. holds_input: of `kept`, bytes of what entered.
    experts: of `gradients`, those of experts. moments: of its backward, the fullest between one layer of
    experts and the next, and where the gradients of a layer's experts have just come. adding: the most of a
    backward that adds its gradients to those of another in place.
    """

    forward: Work
    backward_input: Work
    backward_weight: Work
    kept: float
    later: float
    gradients: float
    in_forward: Level
    in_backward: Level
    out: float
    holds_input: float = 0.0
    experts: float = 0.0
    moments: tuple[Level, ...] = ()
    adding: Level = NOTHING

    @property
    def backward(self) -> Work:
        """Both halves."""
        return joined([self.backward_input, self.backward_weight])


Enters = Callable[[Tape], Var]


def piece(how: How, enters: Enters | None, compute: Callable[[Tape, Var | None], Var]) -> Piece:
    """Count a part. enters: makes its input; None where it has none. compute: its forward."""
    t = Tape(how.item, halves=how.halves, trains=how.trains, low=how.low, host=how.host)
    given = [None if enters is None else enters(t)]
    entered = None if given[0] is None else weakref.ref(given[0].store)
    if given[0] is not None and how.below:
        t.leaf(given[0])
    y = compute(t, given.pop())
    out = y.store.size
    in_forward = Level(passing=t.peak)
    root = Var(Storage(t, 0, PASSING), 0, 0, y.item, y.edge)
    scalar = y.width == 1
    if scalar:
        out = 0.0  # a loss, which is summed at once
    del y
    kept = sum(t.live)
    still = None if entered is None else entered()
    holds = 0.0 if still is None else still.size
    del still
    t.what = PASSING
    t.forget()
    if root.edge is not None:
        grad = Storage(t, out, PASSING)
        held = [grad]
        del grad
        t.backward(root, held.pop())
    in_backward = Level(*t.at)
    moments = [in_backward]
    if t.experts:
        moments.append(Level(*t.at_experts, ending=t.experts))
    gradients = sum(g.size for g in t.weights.values())
    later = sum({id(s): s.size for row in t.later for s in row if s is not None}.values())
    return Piece(
        forward=t.tallies[FORWARD].work(),
        backward_input=t.tallies[BACKWARD_INPUT].work(),
        backward_weight=t.tallies[BACKWARD_WEIGHT].work(),
        kept=kept,
        later=later,
        gradients=gradients,
        in_forward=Level(kept, in_forward.total - kept),
        in_backward=in_backward,
        out=out,
        holds_input=holds,
        experts=t.experts,
        moments=tuple(moments),
        adding=Level(*t.at_most),
    )


def joined(works: Iterable[Work]) -> Work:
    """Several, with equal kernels and messages once. The same object several times takes no longer."""
    often: dict[int, tuple[Work, int]] = {}
    for work in works:
        often[id(work)] = work, often.get(id(work), (work, 0))[1] + 1
    if len(often) == 1:
        ((work, n),) = often.values()
        if n == 1:
            return work
    kernels: dict[tuple[Any, ...], float] = {}
    messages: dict[tuple[Any, ...], float] = {}
    for work, n in often.values():
        for found, every in ((kernels, work.kernels), (messages, work.messages)):
            for one in every:
                key = one[:-1]
                found[key] = found.get(key, 0.0) + n * one[-1]
    return Work(
        tuple(Kernel._make((*key, n)) for key, n in kernels.items()),
        tuple(Message._make((*key, n)) for key, n in messages.items()),
    )


@lru_cache(maxsize=1 << 12)
def keeping(size: float) -> Piece:
    """What a stage keeps without computing anything."""
    level = Level(kept=size)
    nothing = Work()
    return Piece(
        nothing,
        nothing,
        nothing,
        size,
        later=0.0,
        gradients=0.0,
        in_forward=level,
        in_backward=level,
        out=0.0,
        adding=level,
    )


def chain(pieces: Sequence[Piece]) -> Piece:
    """Parts one after another."""
    before, after = 0.0, sum(p.gradients for p in pieces)
    done = sum(p.experts for p in pieces)
    forward = backward = adding = NOTHING
    fullest: dict[tuple[float, float], Level] = {}
    grad = 0.0 if not pieces else pieces[-1].out  # the caller's, until the backward's end
    for k, p in enumerate(pieces):
        after -= p.gradients
        done -= p.experts
        held = grad if k + 1 < len(pieces) else 0.0
        forward = max(forward, p.in_forward.plus(kept=before), key=_total)
        backward = max(backward, p.in_backward.plus(kept=before, passing=held, gradients=after), key=_total)
        adding = max(adding, p.adding.plus(kept=before, passing=held), key=_total)
        for one in p.moments:
            now = one.plus(before, held, after, done)
            key = now.done, now.ending
            fullest[key] = max(fullest.get(key, now), now, key=_total)
        before += p.kept
    return Piece(
        forward=joined(p.forward for p in pieces),
        backward_input=joined(p.backward_input for p in pieces),
        backward_weight=joined(p.backward_weight for p in pieces),
        kept=before,
        later=sum(p.later for p in pieces),
        gradients=sum(p.gradients for p in pieces),
        in_forward=forward,
        in_backward=backward,
        out=pieces[-1].out if pieces else 0.0,
        holds_input=next((p.holds_input for p in pieces if p.out or p.gradients), 0.0),
        experts=sum(p.experts for p in pieces),
        moments=tuple(fullest.values()),
        adding=adding,
    )


def _total(level: Level) -> float:
    return level.total
