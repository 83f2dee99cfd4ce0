"""Samples for a virtual step: those of the config's index, or made-up ones; no payload is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from mm.data.encode import TokenSegment
from mm.data.sample import Index, Part, Sample, Segment
from mm.errors import DataError
from mm.plan.blueprint import Blueprint
from mm.plan.inputs import EncoderUse, PlanInputs
from mm.plan.select import select
from mm.ranks.batch import Assembler
from mm.ranks.job import open_index

ITEMS = 8  # of each encoder in a made-up sample
FILLED = (1.0, 0.6, 0.85, 0.4)  # shares of data.context that made-up samples fill, one after another


@dataclass(frozen=True)
class VirtualAssembler(Assembler):
    """An assembler that reads nothing: texts have their lengths, items the shapes of their metadata."""

    @classmethod
    def of(cls, assembler: Assembler) -> Self:
        """The same without payloads."""
        return cls(**{f.name: getattr(assembler, f.name) for f in fields(assembler)})

    def encoded(self, sample: Sample) -> tuple[TokenSegment, ...]:
        return tuple(
            TokenSegment("text", [0] * (s.tokens if s.written is None else s.written), "", s.loss, s.depends)
            for s in sample.segments
            if s.part is None and s.ids is None
        )

    def _prepared(self, use: EncoderUse, sample: Sample, part: Part) -> Tensor:
        shape = use.cls.input_count(use.cfg, part.meta), *use.cls.input_shape(use.cfg)
        return torch.empty(shape)


@dataclass(frozen=True)
class VirtualData:
    """The samples of a virtual step. note: what they are, in words."""

    index: Index
    note: str


def virtual_data(blueprint: Blueprint, *, even: bool = False) -> VirtualData:
    """The samples of data.train where they are there, else made-up ones.

    even: made-up samples of one length in any case, so that all data-parallel ranks have equal shapes.
    """
    cfg = blueprint.cfg
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


def made_up_index(blueprint: Blueprint, *, even: bool = False) -> Index:
    """The made-up samples of one step; see made_up()."""
    cfg = blueprint.cfg
    return select(made_up(blueprint.inputs, cfg.train.global_batch, even=even), blueprint.inputs, cfg.data)


def made_up(inputs: PlanInputs, count: int, *, even: bool) -> Index:
    """`count` samples that fit data.context: an item of each encoder, then text.

    even: all fill it; else by FILLED. Each has up to ITEMS items of every encoder, which take at most half of
    it; an encoder whose class has no example() has none.
    """
    samples = []
    for i in range(count):
        total = int(inputs.context * (1.0 if even else FILLED[i % len(FILLED)])) - 2
        segments, left = [], max(1, total)
        for module, use in inputs.encoders.items():
            meta = use.cls.example(use.cfg, max(1, total // (2 * ITEMS * len(inputs.encoders))))
            rows = 0 if meta is None else use.rows(meta)
            for _ in range(ITEMS if meta is not None else 0):
                if rows < left:
                    segments.append(_item(module, meta or {}))
                    left -= rows
        segments.append(Segment("text", left, None, True, None))
        json_part = Part("made-up", "json", i, 0, "", {})
        samples.append(Sample(i, f"{i}", "made-up", tuple(segments), json_part))
    return Index(tuple(samples), (), ("made-up",))


def _item(module: str, meta: Mapping[str, int]) -> Segment:
    # Parts of equal metadata share a place, so that rows are worked out once.
    place = zlib.crc32(json.dumps(meta).encode())
    part = Part("made-up", f"{module}.x", place, 0, "", meta)
    return Segment(module, 0, part, False, None)
