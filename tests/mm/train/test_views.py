"""What FSDP holds gives tensors of its own: of a view it warns, on every rank, for its hooks can be lost."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.mm.harness import small, train_few


def warned(raws: list[dict[str, Any]]) -> list[str]:
    """What a step of each job warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for raw in raws:
            train_few(raw, 1)
    return sorted({str(w.message)[:60] for w in found if "FSDP2" in str(w.message)})


@pytest.mark.slow
def test_no_module_gives_a_view(ranks: Any) -> None:
    train = {**small()["train"], "global_batch": 4}
    latent = small(train=train, schedule={"microbatches": 1})
    latent["model"]["llm"] = {"preset": "tiny-latent", "aux_weight": 1e-4, "z_weight": 1e-4}
    sequence = {m: {"tp": 2, "sequence_parallel": True} for m in ("vision", "audio", "llm")}
    layouts: list[dict[str, Any]] = [
        sequence,
        {"vision": {"pp": 2}, "audio": {"cp": 2}, "llm": {"cp": 2, "ep": 2}},
    ]
    raws = [
        {**small(train={**train, "shard": shard}), "layout": x}
        for x in layouts
        for shard in ("layer", "module")
    ]
    for found in ranks(2, warned, [latent, {**latent, "layout": {"llm": {"tp": 2}}}, *raws]):
        assert found == []
