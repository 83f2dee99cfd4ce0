"""A blueprint's model as containers see it."""

from __future__ import annotations

from mm.containers.container import Tower, Whole
from mm.plan.blueprint import Blueprint, projector_kind


def whole_of(blueprint: Blueprint) -> Whole:
    """The modules, without layouts and weights."""
    return Whole(blueprint.llm, {m: tower_of(blueprint, m) for m in blueprint.inputs.encoders})


def tower_of(blueprint: Blueprint, module: str) -> Tower:
    """An encoder module."""
    use, enc = blueprint.inputs.encoders[module], blueprint.cfg.model[module]
    return Tower(enc.encoder, use.cls, use.cfg, projector_kind(enc.projector), enc.projector.hidden)
