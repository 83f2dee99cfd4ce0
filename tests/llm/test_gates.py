"""No degree is ignored by any kind of layer: tp, sp and cp take work off a rank.

A layer that did everything on every rank would be right, so parity alone would not notice. test_degrees shows
that ep, etp and tp shard weights, test_stages that stages hold their own layers, test_fsdp that dp shards
weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm.layer import Layer
from llm.moe import ForwardContext
from llm.mtp import MultiToken
from parallel.context_parallel import pack
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import initialise
from parallel.topology.axis import Axes
from tests.llm.degrees import Degrees, make_axes
from tests.llm.harness import shard_by_hand
from tests.llm.test_degrees import CFG

WIDE = replace(
    CFG, d_model=32, n_heads=8, n_kv_heads=8, mamba_heads=8, mamba_groups=4, mamba_head_dim=8,
    expert_ffn=32, shared_ffn=64, mlp_ffn=64, mtp_pattern="*E",
)  # fmt: skip
KINDS = ("M", "*", "-", "E", "multi-token prediction")
TOKENS = 32
DEGREES = {
    "tp": Degrees(2, tp=2),
    "sp": Degrees(2, tp=2, sp=True),
    "cp": Degrees(2, cp=2),
    "cp zigzag": Degrees(2, cp=2, order="zigzag"),
}


def work(kind: str, degrees: Degrees, axes: Axes) -> int:
    """Operations of matrix products in this rank's forward, over its rows of TOKENS tokens."""
    packing = pack([TOKENS], "cpu", axes.cp, degrees.order)
    ctx = ForwardContext(packing, packing.total)
    factory: FactoryKwargs = {"device": None, "dtype": torch.float64}
    mtp = kind == "multi-token prediction"
    module: Any = MultiToken(WIDE, axes, **factory) if mtp else Layer(kind, WIDE, axes, **factory)
    initialise(module, 3, "layer")
    shard_by_hand(module, axes)
    x = torch.randn(packing.total // axes.token_shards, WIDE.d_model, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        y = module(x, x, ctx) if mtp else module(x, ctx)
    assert y.shape == x.shape
    return int(counter.get_total_flops())


def works(degrees: Degrees | None) -> list[int]:
    torch.manual_seed(dist.get_rank())
    axes = Axes() if degrees is None else make_axes(degrees)
    return [work(kind, degrees or Degrees(1), axes) for kind in KINDS]


@pytest.fixture(scope="module")
def alone(pool: Any) -> list[int]:
    out: list[int] = pool.run(1, works, None)[0]
    return out


@pytest.mark.parametrize("degree", DEGREES)
def test_work_is_shared(degree: str, ranks: Any, alone: list[int]) -> None:
    results = ranks(2, works, DEGREES[degree])
    for i, kind in enumerate(KINDS):
        worst = max(r[i] for r in results) / alone[i]
        # Without sequence parallelism every tp rank joins all tokens with their embeddings.
        assert worst < (0.7 if (kind, degree) == ("multi-token prediction", "tp") else 0.55), worst
