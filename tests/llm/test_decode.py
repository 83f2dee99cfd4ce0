"""Answers: a token at a time equals the whole document at once, and transformers' generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm import load_hf
from llm.cache import CachedPacking
from llm.decode import Prompt, Sampling, _choose, decode, generate, next_logits
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from parallel.sequence.packed import Packing
from tests.llm.families import RANDOM
from tests.llm.family_checks import hold_generate
from tests.llm.harness import TINY, build, tiny
from tests.llm.oracle import oracle, save
from tests.llm.widened import Widened
from tests.slow import on_demand

PATTERNS = {
    "all kinds": {"pattern": "ME*-M*"},
    "rotary": {"pattern": "*-*E", "rope_theta": 1e4, "attention_bias": True},
    "Mamba alone": {"pattern": "MM", "conv_kernel": 3},
    "tied, levels": {"pattern": "*M-", "tied": True, "level_layers": (1,)},
    "windows": {"pattern": "**", "rope_theta": 1e4, "window": 4, "window_layers": (0,), "norms": "both"},
    "bounded": {"pattern": "*-", "attention_cap": 0.5, "window": 3, "logit_cap": 2.0, "qk_norm": "head"},
    "sinks": {"pattern": "**", "attention_sinks": True, "window": 3, "window_layers": (1,)},
    "latents": {
        **{"pattern": "**", "kv_rank": 5, "q_rank": 6, "head_dim": 7, "rope_head_dim": 4, "v_head_dim": 9},
        **{"n_kv_heads": 8, "rope_theta": 1e4, "window": 3, "window_layers": (1,), "attention_scale": 0.3},
    },
    "latent, gated": {"pattern": "E*M", "latent": 8, "mlp_gated": True, "activation": "silu"},
}


def model_of(**changes: Any) -> LLM:
    return build(tiny(**changes)).eval()


def whole_logits(model: LLM, ids: Tensor, prompt: Prompt) -> Tensor:
    """Logits of all tokens of one document, computed at once."""
    batch = LLMBatch(ids, ids, Packing.of([len(ids)]), len(ids), prompt.positions)
    states = model.states(batch, prompt.rows, ForwardContext(batch.packing, len(ids)))
    x = F.linear(states, model.head_weight())
    return x if model.cfg.logit_cap is None else torch.tanh(x / model.cfg.logit_cap) * model.cfg.logit_cap


@torch.no_grad()
def forced(model: LLM, prompts: Sequence[Prompt], answers: Tensor) -> Tensor:
    """Logits [n, B, vocab] with these tokens [n, B] in the place of chosen ones."""
    out: list[Tensor] = []

    def choose(logits: Tensor, *rest: Any) -> list[int]:
        out.append(logits)
        return [int(t) for t in answers[len(out) - 1]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.decode._choose", choose)
        list(decode(model, prompts, len(answers)))
    return torch.stack(out)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_at_a_time_is_the_whole_document_at_once(name: str) -> None:
    model = model_of(**PATTERNS[name])
    levels = len(model.cfg.level_layers) + 1

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 99))
    def check(lengths: list[int], steps: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        prompts = []
        for n in lengths:
            ids = torch.randint(0, model.cfg.vocab_size, (n,), generator=gen)
            at = torch.arange(0, n, 3)[: seed % 3]
            rows = torch.randn(len(at), levels, model.cfg.d_model, generator=gen, dtype=torch.float64)
            rows = rows if levels > 1 else rows[:, 0]
            prompts.append(Prompt(ids, {"vision": rows}, {"vision": at}) if len(at) else Prompt(ids))
        answers = torch.randint(0, model.cfg.vocab_size, (steps, len(lengths)), generator=gen)
        found = forced(model, prompts, answers)
        for i, prompt in enumerate(prompts):
            ids = torch.cat([prompt.ids, answers[:-1, i]])
            expected = whole_logits(model, ids, prompt)[len(prompt.ids) - 1 :]
            torch.testing.assert_close(found[:, i], expected, rtol=1e-9, atol=1e-9)

    check()


@pytest.mark.parametrize("pattern", ["MEM*-E", "*-*-"])
def test_greedy_answers_are_those_of_transformers(pattern: str, tmp_path: Path) -> None:
    theirs = oracle(pattern).eval()
    ours = load_hf(save(theirs, tmp_path / "m"), dtype=torch.float64).model.eval()
    for seed in range(2):
        ids = torch.randint(0, 97, (1, 5 + 4 * seed), generator=torch.Generator().manual_seed(seed))
        with Widened():
            expected = theirs.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert generate(ours, [Prompt(ids[0])], 24)[0] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", on_demand(RANDOM, [*{*RANDOM} - {"qwen3"}]))
def test_greedy_answers_of_every_family(name: str, tmp_path: Path) -> None:
    for seed in (1, 4):
        hold_generate(name, seed, tmp_path / str(seed))


def test_an_answer_ends_at_a_stop_and_others_go_on() -> None:
    model = model_of()
    prompts = [Prompt(torch.tensor([1, 2, 3])), Prompt(torch.tensor([4]))]
    free = generate(model, prompts, 12)
    assert [generate(model, [p], 12)[0] for p in prompts] == free  # what is in a batch changes nothing
    stop = free[0][4]
    expected = [own[: own.index(stop) + 1] if stop in own else own for own in free]
    assert generate(model, prompts, 12, stops=[stop]) == expected
    assert len(list(decode(model, prompts, 12, stops=range(TINY.vocab_size)))) == 1
    assert generate(model, prompts, 0) == []
    for none in ([], [Prompt(torch.tensor([], dtype=torch.int64))]):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            list(decode(model, none, 1))


def test_long_answers_outgrow_the_room_of_keys() -> None:
    model = model_of(pattern="*")
    answer = generate(model, [Prompt(torch.tensor([3]))], 270)[0]
    logits = whole_logits(model, torch.tensor([3, *answer[:-1]]), Prompt(torch.tensor([3])))
    assert logits.argmax(-1).tolist() == answer


def test_draws_follow_the_probabilities_within_top_p() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    n = 4000

    generators = [torch.Generator().manual_seed(i) for i in range(n)]

    def shares(**how: Any) -> list[float]:
        found = _choose(logits.expand(n, -1), Sampling(**how), generators)
        return [found.count(k) / n for k in range(4)]

    def close(expected: list[float]) -> Any:
        return pytest.approx(expected, abs=0.03)

    assert shares(temperature=1.0) == close([0.1, 0.5, 0.15, 0.25])
    assert shares(temperature=1.0, top_p=0.75) == close([0.0, 2 / 3, 0.0, 1 / 3])
    assert shares(temperature=1.0, top_p=0.4) == shares(temperature=0.0) == [0.0, 1.0, 0.0, 0.0]
    cold = torch.softmax(logits[0] / 0.5, -1).tolist()
    assert shares(temperature=0.5) == close(cold)


def test_a_seed_repeats_an_answer_whatever_is_beside_it() -> None:
    model, prompts = model_of(), [Prompt(torch.tensor([k])) for k in range(3)]
    one = generate(model, prompts, 8, Sampling(1.0, seed=5))
    assert one == generate(model, prompts, 8, Sampling(1.0, seed=5))
    other = Sampling(1.0, seed=6)
    assert one != generate(model, prompts, 8, other)
    assert one[1] == generate(model, prompts[1:2], 8, other)[0]
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="needed"):
            Sampling(**wrong)


def test_the_packing_of_next_tokens() -> None:
    packing = CachedPacking((1, 1), torch.device("cpu"), past=(4, 7))
    assert packing.position.tolist() == [4, 7] and packing.whole == (5, 8) and not packing.begins
    states = torch.eye(5, TINY.d_model, dtype=torch.float64)
    first = CachedPacking((2, 3), torch.device("cpu"), past=(0, 0))
    assert first.position.tolist() == [0, 1, 0, 1, 2] and first.begins
    model = model_of(pattern="-")
    assert next_logits(model, states, first).equal(model.head_weight()[:, [1, 4]].T)
