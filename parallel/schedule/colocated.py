"""The schedule where every module lives on the same ranks and the language model has one stage.

Per micro-batch: encoders forward, boundaries, language model forward and backward, boundaries and encoders
backward. Only one micro-batch's activations are ever alive.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from parallel.schedule.action import Action, Kind


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
    # The gradients of a module are reduced once, after its last backward of the step.
    final = {m: max((i for i, a in enumerate(active) if m in a), default=-1) for m in sources}
    out: list[Action] = []
    for i, present in enumerate(active):
        ordered = [m for m in sources if m in present]
        out += [Action(Kind.FORWARD, m, i) for m in ordered]
        out += [Action(Kind.BOUNDARY_FORWARD, m, i) for m in ordered]
        out.append(Action(Kind.FORWARD, sink, i))
        if not train:
            continue
        back = [m for m in ordered if m not in frozen]
        if sink not in frozen or back:
            out.append(Action(Kind.BACKWARD, sink, i, last=i == len(active) - 1))
        out += [Action(Kind.BOUNDARY_BACKWARD, m, i) for m in back]
        out += [Action(Kind.BACKWARD, m, i, last=i == final[m]) for m in back]
    return tuple(out)
