"""Multi-head latent attention under every degree, and what generation keeps of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.cache import Cache, CachedPacking
from llm.checks import check
from llm.flops import layer_flops, layer_params
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from parallel.comm.fetch import Fetch
from tests.llm import test_fsdp, test_whole
from tests.llm.degrees import Degrees, held_fraction, make_axes, run
from tests.llm.harness import build, tiny
from tests.llm.test_degrees import CFG, PAIRS, STREAMS, check_many, layouts

LATENT = replace(
    CFG, n_kv_heads=4, kv_rank=5, q_rank=6, head_dim=7, rope_head_dim=4, v_head_dim=6, rope_interleaved=True
)
OTHER = replace(LATENT, q_rank=None, v_head_dim=9, attention_bias=False, window=6)


def test_tp_and_cp(ranks: Any) -> None:
    cases = [(LATENT, "*", PAIRS[name], frozenset[str]()) for name in ("tp2 sp", "cp2 zigzag")]
    cases += [(OTHER, "*", PAIRS["cp2 zigzag"], frozenset({"attention_core"}))]
    check_many(ranks, 2, cases)


def travelled() -> set[int]:
    """Numbers a token in what fetches are given, forward, with a window and without."""
    seen: set[int] = set()
    starts = {name: getattr(Fetch, name) for name in ("__call__", "start", "start_round")}
    axes = make_axes(PAIRS["cp2"])
    with pytest.MonkeyPatch.context() as patch:
        for name, original in starts.items():

            def note(fetch: Fetch, x: Tensor, *rest: Any, original: Any = original) -> Any:
                seen.add(x[:1].numel())
                return original(fetch, x, *rest)

            patch.setattr(Fetch, name, note)
        for cfg in (LATENT, OTHER):
            run(cfg, "*", PAIRS["cp2"], STREAMS[:1], frozenset(), axes)
    return seen


def test_rows_of_latents_travel_under_cp(ranks: Any) -> None:
    for seen in ranks(2, travelled):
        assert seen == {5 + 4}  # kv_rank and rope_head_dim, not keys and values of four heads


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_degree_and_pair(world: int, ranks: Any) -> None:
    named = [PAIRS[n] for n in layouts("*") if PAIRS[n].world == world]
    cases = [(LATENT, "*", d, frozenset[str]()) for d in named]
    cases += [(OTHER, "*", d, frozenset({"attention_core"})) for d in named]
    cases += [(LATENT, "*", named[-1], frozenset({"full", "norm"}))]
    check_many(ranks, world, cases)


# The whole model of tests, with a block of multi-token prediction, all of whose attention is by latents.
LATENTS: dict[str, Any] = {
    **{"n_kv_heads": 8, "kv_rank": 5, "q_rank": 6, "head_dim": 6, "rope_head_dim": 4, "v_head_dim": 7},
    "rope_interleaved": True,
}
FOUR = (
    Degrees(4, tp=2, cp=2, sp=True, order="zigzag", ranks=(2, 0, 3, 1)),
    Degrees(4, tp=2, ep=2),
    Degrees(4, cp=2, ep=4),
)


@pytest.mark.slow
def test_whole_models_and_stages(ranks: Any) -> None:
    cfg = replace(test_whole.MODEL, **LATENTS)
    again = ("attention_core", "full", "none")
    cases = [test_whole.Case(cfg, d, (2, 3), part) for d, part in zip(FOUR, again, strict=True)]
    results = ranks(4, test_whole.run_rank, cases, timeout=120)
    for i, case in enumerate(cases):
        test_whole.compare(case, [r[i] for r in results])


@pytest.mark.slow
def test_weights_and_updates_sharded_over_data(ranks: Any) -> None:
    cfg = replace(test_fsdp.MODEL, **LATENTS)
    zeros: tuple[test_fsdp.Zero, ...] = (1, 2, 3)
    cases = [test_fsdp.Case(cfg, d, zero) for d, zero in zip((*FOUR[1:], FOUR[0]), zeros, strict=True)]
    results = ranks(4, test_fsdp.run_cases, cases, timeout=240)
    for i, case in enumerate(cases):
        test_fsdp.check(case, [r[i] for r in results])


def test_weights_are_sharded() -> None:
    wide = replace(LATENT, d_model=64, v_head_dim=64, kv_rank=16, q_rank=16, head_dim=64)
    whole, held = layer_params(wide, "*")[0], held_fraction(wide, "*", Degrees(2, tp=2))
    down = 64 * (16 + 16 + 4)  # latents of all heads, which each rank makes
    assert abs(held - 0.5 * (1 + down / whole)) < 0.01


def test_generation_keeps_one_latent_of_each_token() -> None:
    model = build(tiny(pattern="*", kv_rank=5, rope_head_dim=2, n_kv_heads=8)).eval()
    cache, ids = Cache(), torch.arange(6)
    packing = CachedPacking((4, 2), torch.device("cpu"), past=(0, 0), cache=cache)
    model.states(LLMBatch(ids, ids, packing, 6, {}), {}, ForwardContext(packing, 6))
    (kept,) = cache.layers.values()
    assert kept.k.shape[2:] == (1, 5 + 2) and kept.v.numel() == 0


def test_counts_are_those_of_the_model() -> None:
    for cfg in (LATENT, OTHER, replace(OTHER, attention_bias=True)):
        layer = LLM(replace(cfg, pattern="*"), device="meta").layers[0]
        assert layer_params(cfg, "*")[0] == sum(p.numel() for p in layer.parameters())
    # Of one query and one key: a score over head_dim features, a value of v_head_dim.
    more = layer_flops(LATENT, "*", [2]) - 2 * layer_flops(LATENT, "*", [1])
    assert more == 2.0 * LATENT.n_heads * (7 + 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_rank": None, "q_rank": 4}, "q_rank without kv_rank would have no effect"),
        ({"rope_head_dim": None}, "rope_head_dim=None; needed: the features with positions among head_dim=7"),
        ({"rope_head_dim": 7}, "rope_head_dim=7; needed"),
        ({"rope_head_dim": 3}, "rope_head_dim=3 with rope_theta; needed: even"),
        ({"n_kv_heads": 2}, "n_kv_heads=2; needed: n_heads=4"),
        ({"qk_norm": "head"}, "qk_norm=head with kv_rank; needed: none"),
        ({"rope_share": 0.5}, "rope_share=0.5 with kv_rank"),
        ({"q_rank": 0}, "q_rank is 0; needed: at least 1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    check(LATENT)
    given = {"q_rank": None, "rope_head_dim": None, "v_head_dim": None} if "kv_rank" in changes else {}
    with pytest.raises(ValueError, match=words):
        check(replace(LATENT, **(given | changes)))
