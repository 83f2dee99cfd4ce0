"""Samples for a virtual step: those of the config's index, or made-up ones; no payload is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from mm.data.encode import TokenSegment
from mm.data.sample import Index, Part, Sample
from mm.errors import DataError
from mm.plan.blueprint import Blueprint
from mm.plan.inputs import EncoderUse
from mm.plan.made_up import made_up_index
from mm.ranks.batch import Assembler
from mm.ranks.job import open_index


@dataclass(frozen=True)
class VirtualAssembler(Assembler):
    """An assembler that reads nothing: texts have their lengths, items the shapes of their metadata."""

    @classmethod
    def of(cls, assembler: Assembler) -> Self:
        """The same without payloads."""
        return cls(**{f.name: getattr(assembler, f.name) for f in fields(assembler)})

    def encoded(self, sample: Sample) -> tuple[TokenSegment, ...]:
        before = 0 if sample.portion is None else sample.portion.texts
        own = [s for s in sample.segments if s.part is None and s.ids is None]
        lengths = [0] * before + [s.tokens if s.written is None else s.written for s in own]
        return tuple(TokenSegment("text", [0] * n, "", True, None) for n in lengths)

    def _prepared(self, use: EncoderUse, sample: Sample, part: Part, out: Tensor | None = None) -> Tensor:
        shape = use.cls.input_count(use.cfg, part.meta), *use.cls.input_shape(use.cfg)
        return torch.empty(shape)


@dataclass(frozen=True)
class VirtualData:
    """The samples of a virtual step. note: what they are, in words."""

    index: Index
    note: str


def virtual_data(blueprint: Blueprint, *, even: bool = False) -> VirtualData:
    """The samples of data.synthetic, else those of data.train where they are there, else made-up ones.

    even: made-up samples of one length in any case, so that all data-parallel ranks have equal shapes.
    """
    cfg = blueprint.cfg
    if cfg.data.synthetic is not None:
        return VirtualData(made_up_index(blueprint), "made-up samples, as data.synthetic says")
    if not even:
        try:
            index = open_index(blueprint, cfg.data.train, cfg.base, write=False)
            return VirtualData(index, "the first step's samples of data.train")
        except DataError as error:
            why = str(error)
            if "no shard matches" not in why:
                raise
    note = "made-up samples of one length" if even else f"made-up samples of ragged lengths ({why})"
    return VirtualData(made_up_index(blueprint, even=even), note)
