"""Law 1 for every kind of layer: under every degree, pairs of degrees, and random combinations."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm.config import LLMConfig
from llm.layer import Layer
from llm.moe import ForwardContext
from llm.recompute import PARTS
from llm.rotary import RopeScaling
from parallel.sequence.packed import Packing
from tests.llm.degrees import Degrees, check, held_fraction, make_axes, run
from tests.llm.harness import tiny

CFG = tiny(
    d_model=8, n_heads=4, n_kv_heads=2, rope_theta=100.0, attention_bias=True,
    mamba_heads=4, mamba_head_dim=3, mamba_groups=2, chunk=4,
    n_experts=4, top_k=2, expert_ffn=8, mlp_ffn=12, mlp_bias=True,
)  # fmt: skip
KINDS = "M*-E"
Case = tuple[LLMConfig, str, Degrees, frozenset[str]]
STREAMS = [(11, 1, 18), (30,), (), (2, 0, 17, 3)]

PAIRS = {
    "tp2": Degrees(2, tp=2),
    "tp2 sp": Degrees(2, tp=2, sp=True, ranks=(1, 0)),
    "cp2": Degrees(2, cp=2),
    "cp2 zigzag": Degrees(2, cp=2, order="zigzag", ranks=(1, 0)),
    "ep2": Degrees(2, ep=2, ranks=(1, 0)),
    "etp2": Degrees(2, etp=2),
    "dp2": Degrees(2),
    "tp4 sp": Degrees(4, tp=4, sp=True, ranks=(2, 0, 3, 1)),
    "cp4": Degrees(4, cp=4, ranks=(3, 1, 2, 0)),
    "cp4 zigzag": Degrees(4, cp=4, order="zigzag"),
    "ep2 etp2": Degrees(4, ep=2, etp=2, ranks=(2, 1, 3, 0)),
    "tp2 cp2": Degrees(4, tp=2, cp=2),
    "tp2 sp cp2 zigzag": Degrees(4, tp=2, cp=2, sp=True, order="zigzag", ranks=(0, 2, 1, 3)),
    "tp2 dp2": Degrees(4, tp=2),
    "tp2 ep2 across dp": Degrees(4, tp=2, ep=2),
    "tp2 sp ep4": Degrees(4, tp=2, ep=4, sp=True, ranks=(3, 2, 1, 0)),
    "tp2 etp2": Degrees(4, tp=2, etp=2, sp=True),
    "cp2 dp2 zigzag": Degrees(4, cp=2, order="zigzag"),
    "cp2 ep2": Degrees(4, cp=2, ep=2),
    "cp2 ep4": Degrees(4, cp=2, ep=4),
    "cp2 etp2": Degrees(4, cp=2, etp=2, order="zigzag", ranks=(2, 1, 3, 0)),
    "dp4 ep4": Degrees(4, ep=4),
    "dp4 etp2": Degrees(4, etp=2),
}


def layouts(symbol: str) -> list[str]:
    """Names of the layouts that matter to a kind of layer: ep and etp matter to experts alone."""
    return [n for n, d in PAIRS.items() if symbol == "E" or d.ep == d.etp == 1]


def run_many(cases: list[Case], streams: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    out = []
    axes: dict[Degrees, Any] = {}
    for cfg, symbol, degrees, recompute in cases:
        if degrees not in axes:
            axes[degrees] = make_axes(degrees)
        out.append(run(cfg, symbol, degrees, streams[: degrees.layout.dp], recompute, axes[degrees]))
    return out


def check_many(ranks: Any, world: int, cases: list[Case], streams: list[tuple[int, ...]] = STREAMS) -> None:
    results = ranks(world, run_many, cases, streams, timeout=120)
    for i, (cfg, symbol, degrees, _) in enumerate(cases):
        check(cfg, symbol, degrees, streams[: degrees.layout.dp], [r[i] for r in results])


@pytest.mark.parametrize("symbol", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_every_degree_and_pair(symbol: str, world: int, ranks: Any) -> None:
    named = [PAIRS[n] for n in layouts(symbol) if PAIRS[n].world == world]
    check_many(ranks, world, [(CFG, symbol, d, frozenset()) for d in named])


def test_more_ranks_than_key_value_heads_and_groups(ranks: Any) -> None:
    few = replace(CFG, n_kv_heads=1, mamba_groups=1)
    # 6 heads in 3 runs on 2 ranks: the middle run is on both, so a rank's heads read unevenly.
    uneven = replace(CFG, n_heads=6, n_kv_heads=3, mamba_heads=6, mamba_groups=3)
    cases = [(few, s, Degrees(4, tp=4, sp=sp), frozenset[str]()) for s in "M*" for sp in (False, True)]
    cases += [(few, s, Degrees(4, tp=2, cp=2, sp=True), frozenset()) for s in "M*"]
    cases += [(uneven, s, Degrees(4, tp=2, cp=2, order="zigzag"), frozenset()) for s in "M*"]
    # A key head that two ranks use counts once in a norm over all heads.
    for cfg, tp in ((few, 4), (uneven, 2), (replace(CFG, n_kv_heads=4), 2)):
        cases += [(replace(cfg, qk_norm=n), "*", Degrees(4, tp=tp, sp=True), frozenset()) for n in NORMED]
    # Sinks count once for each query, whichever ranks its keys are on.
    both = Degrees(4, tp=2, cp=2, order="zigzag")
    cases += [(replace(CFG, attention_sinks=True, window=w), "*", both, frozenset()) for w in (None, 4)]
    check_many(ranks, 4, cases)


def test_least_sizes(ranks: Any) -> None:
    """One tap, one state, one token a chunk, one expert, one of everything that may be one."""
    least = replace(
        CFG, n_kv_heads=1, head_dim=1, rope_theta=None, mamba_head_dim=1, mamba_state=1, mamba_groups=1,
        conv_kernel=1, chunk=1, n_experts=2, top_k=1, expert_ffn=2, shared_ffn=2, mlp_ffn=2,
    )  # fmt: skip
    degrees = [Degrees(2, tp=2, sp=True), Degrees(2, cp=2), Degrees(2, cp=2, order="zigzag")]
    cases = [(least, s, d, frozenset[str]()) for s in KINDS for d in degrees]
    check_many(
        ranks,
        2,
        [*cases, (least, "E", Degrees(2, ep=2), frozenset()), (least, "E", Degrees(2, etp=2), frozenset())],
    )


def test_parts_computed_again_under_cp(ranks: Any) -> None:
    degrees = Degrees(2, cp=2, order="zigzag")
    again = {"full": "*M", "attention_core": "*", "scan": "M", "mlp": "-", "moe_act": "E", "norm": "M"}
    assert set(again) == set(PARTS)
    cases = [(CFG, s, degrees, frozenset({part})) for part, kinds in again.items() for s in kinds]
    cases.append((CFG, "E", Degrees(2, etp=2), frozenset({"full"})))
    check_many(ranks, 2, cases)


NORMED: tuple[Any, ...] = ("head", "full")


def switches(rng: random.Random) -> dict[str, Any]:
    """Fields of other families' layers."""
    longrope = RopeScaling("longrope", 2.0, 8, short=(1.0,), long=(3.0,))
    return {
        "attention_bias": False,
        "qkv_bias": rng.random() < 0.5,
        "qk_norm": rng.choice(["none", "head", "full"]),
        "rope_theta": 50.0,
        "rope_scaling": rng.choice([None, RopeScaling("yarn", 4.0, 64), longrope]),
        "rope_share": 0.5,
        "norms": rng.choice(["before", "after", "both"]),
        "norm_shift": rng.random() < 0.5,
        "branch_scale": rng.choice([1.0, 0.3]),
        "attention_scale": rng.choice([None, 0.4]),
        "activation": rng.choice(["gelu_tanh", "silu"]),
        "window": rng.choice([None, 1, 4, 9]),
        "attention_cap": rng.choice([None, None, 0.5]),
        "attention_sinks": rng.random() < 0.3,
    }


def draw(rng: random.Random) -> Case:
    """Any layer under any layout of 4 ranks, in any order."""
    tp, cp = rng.choice([(t, c) for t in (1, 2, 4) for c in (1, 2, 4) if t * c <= 4])
    ep, etp = rng.choice([(e, t) for e in (1, 2, 4) for t in (1, 2, 4) if e * t <= 4])
    order = rng.choice(["contiguous", "zigzag"])
    cfg = replace(
        CFG,
        n_kv_heads=rng.choice([1, 2, 4]),
        mamba_groups=rng.choice([1, 2, 4]),
        mamba_state=rng.choice([1, 8]),
        chunk=rng.choice([1, 4, 64]),
        conv_kernel=rng.choice([1, 2, 4]),
        rope_theta=rng.choice([None, 50.0]),
        attention_bias=rng.random() < 0.5,
        mlp_gated=rng.random() < 0.5,
        latent=rng.choice([None, 4]),
        dispatcher=rng.choice(["all_to_all", "all_gather"]),
    )
    symbol = rng.choice(KINDS)
    if rng.random() < 0.5:
        cfg = replace(cfg, **switches(rng))
    ranks = tuple(rng.sample(range(4), 4))
    sp = rng.random() < 0.5
    degrees = Degrees(4, tp=tp, cp=cp, ep=ep, etp=etp, sp=sp, order=order, ranks=ranks)  # type: ignore[arg-type]
    again = rng.choice([(), ("full",), ("norm", "attention_core")])
    return cfg, symbol, degrees, frozenset(again)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_combinations(seed: int, ranks: Any) -> None:
    rng = random.Random(seed)
    streams = [tuple(rng.choice([0, 1, 2, 5, 9, 20]) for _ in range(rng.randint(1, 5))) for _ in range(4)]
    check_many(ranks, 4, [draw(rng) for _ in range(12)], streams)


@pytest.mark.parametrize(
    ("symbol", "degrees"),
    [(s, Degrees(2, tp=2)) for s in KINDS] + [("E", Degrees(2, ep=2)), ("E", Degrees(2, etp=2))],
)
def test_weights_are_sharded(symbol: str, degrees: Degrees) -> None:
    wide = replace(CFG, d_model=64, mlp_ffn=64)
    # ep and etp shard the routed experts, tp the rest of an E layer; nothing shards norms and routers.
    shape = {"expert_ffn": 128, "shared_ffn": 8} if degrees.tp == 1 else {"expert_ffn": 1, "shared_ffn": 512}
    assert held_fraction(replace(wide, **shape), symbol, degrees) < 0.56


def without_cp(symbols: str, degrees: Degrees) -> list[dict[str, Any]]:
    axes = make_axes(degrees)
    return [run(CFG, s, degrees, STREAMS[:1], frozenset(), axes, ignores_cp=True) for s in symbols]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_layer_that_ignored_cp_would_be_found(order: Any, ranks: Any) -> None:
    degrees = Degrees(2, cp=2, order=order)
    results = ranks(2, without_cp, "M*", degrees)
    for i, symbol in enumerate("M*"):
        with pytest.raises(AssertionError, match="off by"):
            check(CFG, symbol, degrees, STREAMS[:1], [r[i] for r in results])


def unpacked() -> list[str]:
    """The errors of layers under cp that are given a packing without cp."""
    axes, out = make_axes(Degrees(2, cp=2)), []
    for symbol in "M*":
        layer = Layer(symbol, CFG, axes, device=None, dtype=torch.float64)
        try:
            layer(torch.zeros(4, CFG.d_model, dtype=torch.float64), ForwardContext(Packing.of([4]), 4))
        except AssertionError as error:
            out.append(str(error))
    return out


def test_a_whole_packing_under_cp_is_refused(ranks: Any) -> None:
    for errors in ranks(2, unpacked):
        assert len(errors) == 2 and all("under cp" in error for error in errors)
