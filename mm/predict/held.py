"""Memory of a step by place of the pipelines: what is held all along, and activations in order of actions."""

from __future__ import annotations

from collections.abc import Mapping

from mm.predict.hardware import Hardware
from mm.predict.work import Counts
from parallel.schedule import SchedulePlan
from parallel.schedule.checker.memory import Memory, peaks

KINDS = ("parameters", "optimizer", "gathered", "gradients", "activations", "temporary", "reserved")


def schedule_memory(counts: Counts) -> Memory:
    """What the schedule's actions take and free, as the checker has it."""
    hidden = {(m, s + 1): size for (m, s), size in counts.hidden.items()}  # by the stage that they enter
    rows = counts.rows
    kept: dict[str | tuple[str, int], float] = {key: size for key, size in counts.kept.items()}
    return Memory(activation=kept, load=counts.load, hidden=hidden, held=rows, read=rows)


def by_program(plan: SchedulePlan, counts: Counts, hardware: Hardware) -> Mapping[int, Mapping[str, float]]:
    """By the first rank of each program, its bytes by kind."""
    found = peaks(plan, schedule_memory(counts))
    out = {}
    for place, peak in zip(plan.places, found, strict=True):
        held = [counts.held[m, pp] for m, pp in zip(plan.modules, place, strict=True) if pp is not None]
        out[peak.ranks[0]] = {
            "parameters": sum(h.parameters for h in held),
            "optimizer": sum(h.optimizer for h in held),
            "gathered": sum(h.gathered for h in held),
            "gradients": sum(h.gradients for h in held),
            "activations": peak.bytes,
            "temporary": max((h.temporary for h in held), default=0.0),
            "reserved": hardware.memory.reserved,
        }
    return out
