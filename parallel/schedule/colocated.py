"""The schedule where every module lives on the same ranks and the language model has one stage.

Per micro-batch: encoders forward, boundaries, language model forward and backward, boundaries and encoders
backward. Only one micro-batch's activations are ever alive.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from parallel.layout import Layout
from parallel.schedule.action import Action
from parallel.schedule.make import make_schedule
from parallel.schedule.plan import ModuleUse


def colocated(
    active: Sequence[Collection[str]],
    *,
    sources: Sequence[str],
    sink: str,
    frozen: Collection[str] = (),
    train: bool = True,
) -> tuple[Action, ...]:
    """Actions of one step, the same list on every rank.

    active: per micro-batch, the source modules that have items on any rank; a module without items anywhere
        is skipped, on all ranks alike. sources: encoder modules in a fixed order. sink: the language model.
    frozen: modules that need no backward; nothing is sent back to a frozen source.
    train: False lists the forward actions alone, for evaluation.
    """
    uses = {m: ModuleUse(Layout(m, (0,)), frozen=m in frozen) for m in (*sources, sink)}
    return make_schedule("1f1b", uses, sink=sink, active=active, train=train).actions(0)
