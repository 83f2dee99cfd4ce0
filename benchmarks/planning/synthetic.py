"""Samples and layouts of no model: long-tailed texts with ragged items, for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm.data.sample import Part, Sample, Segment
from mm.plan.inputs import EncoderUse, PlanInputs
from parallel.topology.layout import make_layout


class Sized:
    """An encoder as the planner sees it: an item's rows are in its metadata, its cost is of degree two."""

    @classmethod
    def rows(cls, cfg: Any, meta: Mapping[str, int]) -> int:
        """Rows of an item."""
        return meta["rows"]

    @classmethod
    def cost(cls, cfg: Any, meta: Mapping[str, int]) -> float:
        """FLOPs of an item."""
        return 1e6 * meta["rows"] + 1e3 * meta["rows"] ** 2


def samples(n: int, seed: int = 0) -> tuple[Sample, ...]:
    """n samples: a text of 20 to 20,000 bytes (lognormal), 0 to 5 pictures of 1 to 255 rows, 0 to 2 clips."""
    rng = np.random.default_rng(seed)
    texts = np.clip(rng.lognormal(5.5, 1.2, n), 20, 20_000).astype(int).tolist()
    return tuple(_sample(j, text, rng) for j, text in enumerate(texts))


def _sample(j: int, text: int, rng: np.random.Generator) -> Sample:
    found = []
    for kind, most, rows in (("vision", 6, 256), ("audio", 3, 128)):
        for k in range(int(rng.integers(0, most))):
            meta = {"rows": int(rng.integers(1, rows))}
            part = Part("s", f"{kind}{k}", 64 * j + len(found), 1, "", meta)
            found.append(Segment(kind, 0, part, False, None))
    segments = (*found, Segment("text", text, None, True, None))
    return Sample(j, str(j), "s", segments, Part("s", "json", 64 * j + 63, 1, "", {}))


def inputs(world: int, microbatches: int, **more: Any) -> PlanInputs:
    """Vision on every rank, audio tp2 on half of them, the language model tp8 cp2 sequence parallel."""
    half = f"0-{max(2, world // 2) - 1}"
    spec = {"tp": min(8, world), "cp": 2 if world >= 16 else 1, "sequence_parallel": True}
    return PlanInputs(
        llm=make_layout("llm", world, spec),
        encoders={
            "vision": EncoderUse(Sized, None, make_layout("vision", world, {})),
            "audio": EncoderUse(Sized, None, make_layout("audio", world, {"ranks": half, "tp": 2})),
        },
        context=1 << 20,
        microbatches=microbatches,
        order="zigzag",
        **more,
    )
