"""The resampler is Idefics2's, and jobs with it learn the same in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from encoders.projector import Projector, ProjectorKind
from encoders.resampler import Resampling, Sizes
from encoders.share import Share
from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import draw_up
from parallel.topology.axis import Axes
from tests.llm.widened import Widened
from tests.mm.harness import CONFIGS, largest_difference, small, train_few

import tests.llm.oracle  # noqa: F401  isort: skip
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig  # isort: skip
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler  # isort: skip

NAMES = {
    "input_latents_norm": "query_norm",
    "input_context_norm": "feature_norm",
    "post_attention_layernorm": "norm",
    "self_attn.o_proj": "attention.out",
    **{f"self_attn.{n}_proj": f"attention.{n}" for n in "qkv"},
    **{f"mlp.{n}_proj": f"mlp.{n}" for n in ("gate", "up", "down")},
}


def ours(key: str) -> str:
    for theirs, name in NAMES.items():
        key = key.replace(f".{theirs}.", f".{name}.")
    return key.replace("latents", "queries") if key == "latents" else key


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    queries=st.integers(1, 5),
    depth=st.integers(1, 3),
    heads=st.sampled_from([(2, 1), (6, 3), (4, 4)]),
)
def test_it_is_idefics2s(lengths: list[int], queries: int, depth: int, heads: tuple[int, int]) -> None:
    d_in, hidden, d, head_dim = 10, 14, 12, 6
    sizes = Sizes(queries, depth, *heads, head_dim)
    kind = ProjectorKind("resampler", "silu", norm="none", sizes=sizes)
    net = Projector((d_in, hidden, d), Axes(), kind, device=None, dtype=torch.float64)
    cfg = Idefics2PerceiverConfig(
        hidden_size=d,
        resampler_n_latents=queries,
        resampler_depth=depth,
        resampler_n_heads=heads[0],
        resampler_head_dim=head_dim,
        num_key_value_heads=heads[1],
        attn_implementation="sdpa",
    )
    first = Idefics2MLP(d_in, hidden, d, "silu").double()
    oracle = Idefics2PerceiverResampler(cfg).double().eval()
    gen = torch.Generator().manual_seed(1)
    mine = dict(net.named_parameters())
    pairs = {f"resampler.project.{k.replace('_proj', '')}": p for k, p in first.named_parameters()}
    pairs |= {f"resampler.{ours(k)}": p for k, p in oracle.named_parameters()}
    assert pairs.keys() == mine.keys()
    for key, p in pairs.items():
        value = 0.4 * torch.randn(p.shape, generator=gen, dtype=torch.float64) + 0.5 * (p.ndim == 1)
        p.data.copy_(value)
        mine[key].data.copy_(value)
    x = torch.randn(sum(lengths), d_in, generator=gen, dtype=torch.float64)
    given, made = (Share.of(n, Axes()) for n in (lengths, [kind.rows(n) for n in lengths]))
    ways = Resampling.of(given, made, Axes().cp, torch.device("cpu"), 1.0)
    found = net(x, given, ways)
    with Widened():  # its norms ask for float32, which its gradients would be rounded to
        expected = [
            oracle(context=first(item)[None], attention_mask=torch.ones(1, len(item)))
            for item in torch.split(x, lengths)
            if len(item)
        ]
    parts = [e[0] if isinstance(e, Tensor) else e.last_hidden_state[0] for e in expected]
    states = torch.cat([x.new_zeros(0, d), *parts])
    torch.testing.assert_close(found, states, atol=1e-10, rtol=0)
    if not len(states):
        return
    weight = torch.randn(states.shape, generator=gen, dtype=torch.float64)
    (found * weight).sum().backward()
    (states * weight).sum().backward()
    for key, p in pairs.items():
        torch.testing.assert_close(mine[key].grad, p.grad, atol=1e-10, rtol=1e-10)


SMALL = {"kind": "resampler", "activation": "silu", "queries": 3, "depth": 2}
SMALL |= {"heads": 4, "kv_heads": 2, "head_dim": 4}
APART = {"vision": {"ranks": "0-1", "cp": 2}, "audio": {"ranks": 1}, "llm": {"ranks": [3, 2], "tp": 2}}
MIXED = {"vision": {"cp": 2, "tp": 2, "sequence_parallel": True}, "llm": {"ranks": [2, 1, 3, 0], "pp": 2}}
PIPED = {"vision": {"ranks": "0-3", "pp": 2, "data_parallel": "zero2"}, "audio": {"tp": 2}}


def job(**sections: Any) -> dict[str, Any]:
    raw = small(**sections)
    raw["model"]["vision"]["projector"] |= SMALL
    return raw


@pytest.mark.slow
def test_jobs_learn_what_one_process_learns(ranks: Any) -> None:
    expected = ranks(1, train_few, job(), 2)[0]
    for layout in (APART, MIXED, PIPED):
        got = ranks(4, train_few, job(layout=layout, schedule={"microbatches": 2}), 2)
        assert largest_difference(got[0], expected) < 1e-9, layout


def test_an_item_has_the_rows_of_its_queries() -> None:
    use = draw_up(from_mapping(job(), CONFIGS), 1).inputs.encoders["vision"]
    small, large = ({"height": 8, "width": n} for n in (8, 16))
    assert use.rows(small) == use.rows(large) == 3
    assert use.cost(large) - use.cost(small) > use.cls.cost(use.cfg, large) - use.cls.cost(use.cfg, small) > 0


@pytest.mark.parametrize(
    ("layout", "projector", "words"),
    [
        ({"vision": {"tp": 4}}, {}, "projector.kv_heads=2 is not a multiple of tp=4|kv_heads"),
        ({}, {"kv_heads": 3}, "heads"),
        ({}, {"bias": True}, "projector.bias=true with kind=resampler, which has none"),
        ({}, {"queries": 0}, "projector.queries"),
    ],
)
def test_a_resampler_that_cannot_be_is_refused(layout: Any, projector: Any, words: str) -> None:
    raw = job(layout=layout)
    raw["model"]["vision"]["projector"] |= projector
    with pytest.raises(Refused, match=words):
        draw_up(from_mapping(raw, CONFIGS), 4)
