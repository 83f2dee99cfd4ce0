"""Presets have the sizes that their reports give."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from llm.checks import check
from llm.flops import layer_params, mtp_params, param_count
from llm.mamba import ScanScalars
from llm.model import LLM
from llm.presets import PRESETS, preset
from parallel.sharding.param import initialise

# Billions of parameters, total and active per token (both embeddings included), to the digits published;
# None: a dense model.
PUBLISHED = {
    "nemotron-h-8b": ("8.1", None, {"M": 24, "-": 24, "*": 4}),
    "nemotron-h-56b": ("56.3", None, {"M": 54, "-": 54, "*": 10}),
    "nemotron-nano-9b-v2": ("8.9", None, {"M": 27, "-": 25, "*": 4}),
    "nemotron-3-nano-30b-a3b": ("31.6", "3.6", {"M": 23, "E": 23, "*": 6}),
    "nemotron-3-super-120b-a12b": ("120.6", "12.7", {"M": 40, "E": 40, "*": 8}),
    "nemotron-3-ultra-550b-a55b": ("549", "56", {"M": 48, "E": 48, "*": 12}),
    "llama-3-8b": ("8.0", "8.0", {"*": 32, "-": 32}),
    "mixtral-8x7b": ("46.7", "12.9", {"*": 32, "E": 32}),
    # Its model card leaves the embedding out of 3.61 and 5.13 active.
    "gpt-oss-20b": ("20.91", "4.19", {"*": 24, "E": 24}),
    "gpt-oss-120b": ("116.83", "5.71", {"*": 36, "E": 36}),
    # 12 width^2 a layer and two tables of 128,000 rows.
    "gpt-7b": ("7.49", None, {"*": 32, "-": 32}),
    "gpt-14b": ("16.41", None, {"*": 48, "-": 48}),
    "gpt-32b": ("30.56", None, {"*": 64, "-": 64}),
    "gpt-70b": ("66.52", None, {"*": 80, "-": 80}),
    "deepseek-v3": ("671", "37", {"*": 61, "-": 3, "E": 58}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    cfg = preset(name, mtp_layers=0)  # reports do not count the block of multi-token prediction
    total, active, kinds = PUBLISHED[name]
    ours = param_count(cfg)
    for count, said in zip(ours, (total, active or total), strict=True):
        # Some reports round down: one unit of the last digit.
        unit = 10.0 ** -len(said.partition(".")[2])
        assert abs(count / 1e9 - float(said)) < unit, (count, said)
    assert Counter(cfg.symbols) == kinds


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_model(name: str) -> None:
    """One layer of each kind in the model's width: the counts are the module's parameters."""
    cfg = preset(name)
    check(cfg)
    cfg = replace(cfg, pattern="".join(sorted(cfg.kinds)), vocab_size=64, window=None, window_layers=None)
    cfg = replace(cfg, n_experts=cfg.top_k * cfg.expert_groups)
    model = LLM(cfg, device="meta")
    assert param_count(cfg)[0] == sum(p.numel() for p in model.parameters())
    for layer, symbol in zip(model.layers, cfg.symbols, strict=True):
        assert layer_params(cfg, symbol)[0] == sum(p.numel() for p in layer.parameters())
    mtp = 0 if model.mtp is None else sum(p.numel() for p in model.mtp.parameters())
    assert mtp_params(cfg) == mtp


def test_initial_weights_are_the_published_ones() -> None:
    """Normal of init_std, or init_std / sqrt(layers) into the residual stream; Mamba-2's A and time steps."""
    cfg = preset("tiny-latent", d_model=128, expert_ffn=96)
    model = LLM(cfg)
    initialise(model, 0, "llm")
    into_stream = ("mixer.out.weight", "down", "down.weight", "latent_out.weight")
    for name, p in model.named_parameters():
        if name.endswith(("a_log", "dt_bias", ".d")) or "conv" in name or p.ndim == 1:
            continue
        std = cfg.init_std / len(cfg.symbols) ** 0.5 if name.endswith(into_stream) else cfg.init_std
        tolerance = 5 * p.numel() ** -0.5
        assert float(p.detach().std()) == pytest.approx(std, rel=tolerance), name
    scalars = [m for m in model.modules() if isinstance(m, ScanScalars)]
    a = torch.cat([m.a_log.detach().exp() for m in scalars])
    dt = torch.cat([torch.nn.functional.softplus(m.dt_bias.detach()) for m in scalars])
    assert 1.0 <= float(a.min()) < float(a.max()) <= 16.0
    assert 1e-3 * 0.99 <= float(dt.min()) < float(dt.max()) <= 0.1 * 1.01
    for draws in ((a - 1) / 15, (dt / 1e-3).log() / math.log(100)):  # uniform in (0, 1)
        even = (torch.arange(len(draws)) + 0.5) / len(draws)
        assert float((draws.sort().values - even).abs().max()) < 1.6 * len(draws) ** -0.5


def test_unknown_presets_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean nemotron-h-8b"):
        preset("nemotron-h-8")
