"""Samples that are made up, for plans and virtual steps of jobs whose data are not there. Nothing is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence

from mm.config.synthetic import MARKERS, SyntheticConfig
from mm.data.sample import Index, Part, Sample, Segment
from mm.errors import Refused
from mm.plan.blueprint import Blueprint
from mm.plan.inputs import PlanInputs
from mm.plan.select import select

ITEMS = 8  # of each encoder in a made-up sample
FILLED = (1.0, 0.6, 0.85, 0.4)  # shares of data.context that made-up samples fill, one after another


def made_up_index(blueprint: Blueprint, *, even: bool = False) -> Index:
    """The made-up samples of one step: as data.synthetic says, else as made_up() does.

    Raises Refused where an encoder makes no item of so many rows.
    """
    cfg, inputs = blueprint.cfg, blueprint.inputs
    count, given = cfg.train.global_batch, cfg.data.synthetic
    index = made_up(inputs, count, even=even) if given is None else synthetic(inputs, count, given)
    return select(index, inputs, cfg.data)


def synthetic(inputs: PlanInputs, count: int, given: SyntheticConfig) -> Index:
    """`count` equal samples: the items of each encoder in the model's order, then text, which is learned."""
    segments = []
    for module in inputs.encoders:
        if module in given.items:
            one = given.items[module]
            segments += [_item(module, _meta(inputs, module, one.rows))] * one.count
    rows = sum(one.count * one.rows for one in given.items.values())
    left = (given.length or inputs.context) - MARKERS - rows
    segments.append(Segment("text", left, None, True, None))
    return _index([segments] * count)


def _meta(inputs: PlanInputs, module: str, rows: int) -> Mapping[str, int]:
    """Metadata of an item of exactly `rows` rows."""
    use = inputs.encoders[module]
    meta = use.cls.example(use.cfg, rows)
    found = 0 if meta is None else use.rows(meta)
    if found != rows:
        raise Refused(
            f"data.synthetic.items.{module}.rows={rows}, but model.{module} makes no item of so many; "
            + (f"nearest: data.synthetic.items.{module}.rows={found}" if found else "it names no item at all")
        )
    return meta or {}


def made_up(inputs: PlanInputs, count: int, *, even: bool) -> Index:
    """`count` samples that fit data.context: an item of each encoder, then text.

    even: all fill it; else by FILLED. Each has up to ITEMS items of every encoder, which take at most half of
    it; an encoder whose class has no example() has none.
    """
    samples = []
    for i in range(count):
        total = int(inputs.context * (1.0 if even else FILLED[i % len(FILLED)])) - MARKERS
        segments, left = [], max(1, total)
        for module, use in inputs.encoders.items():
            meta = use.cls.example(use.cfg, max(1, total // (2 * ITEMS * len(inputs.encoders))))
            rows = 0 if meta is None else use.rows(meta)
            for _ in range(ITEMS if meta is not None else 0):
                if rows < left:
                    segments.append(_item(module, meta or {}))
                    left -= rows
        samples.append([*segments, Segment("text", left, None, True, None)])
    return _index(samples)


def _index(samples: Sequence[Sequence[Segment]]) -> Index:
    """Samples with these segments."""
    made = [
        Sample(i, f"{i}", "made-up", tuple(segments), Part("made-up", "json", i, 0, "", {}))
        for i, segments in enumerate(samples)
    ]
    return Index(tuple(made), (), ("made-up",))


def _item(module: str, meta: Mapping[str, int]) -> Segment:
    # Parts of equal metadata share a place, so that rows are worked out once.
    place = zlib.crc32(json.dumps(meta).encode())
    part = Part("made-up", f"{module}.x", place, 0, "", meta)
    return Segment(module, 0, part, False, None)
