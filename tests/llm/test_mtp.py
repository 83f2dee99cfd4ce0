"""Multi-token prediction: what is predicted from what, and how it is weighted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm.counts import Counts
from llm.model import LLM, LLMBatch
from llm.moe import ForwardContext
from llm.mtp import IGNORE, ahead
from parallel.sequence.packed import Packing
from parallel.sharding.param import declared
from tests.llm.harness import TINY, Text, build, far, make_batch, tiny, weigh

CFG = tiny(pattern="M*E", mtp_layers=2, mtp_pattern="*E", mtp_weight=0.4)
EMPTY = {"vision": torch.zeros(0, TINY.d_model, dtype=torch.float64)}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 3))
def test_ahead_stays_in_the_document(lengths: list[int], depths: int) -> None:
    total = sum(lengths)
    ids, labels = torch.arange(1, total + 1), torch.arange(101, total + 101)
    mtp_ids, mtp_labels = ahead(ids, labels, Packing.of(lengths), depths)
    at = 0
    for n in lengths:
        for i in range(n):
            for k in range(1, depths + 1):
                inside = i + k < n
                assert mtp_ids[k - 1, at + i] == (ids[at + i + k] if inside else 0)
                assert mtp_labels[k - 1, at + i] == (labels[at + i + k] if inside else IGNORE)
        at += n
    assert mtp_ids.shape == mtp_labels.shape == (depths, total)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CFG.norm_eps).sqrt() * weight


def mtp_loss(model: LLM, batch: LLMBatch) -> tuple[Tensor, Tensor]:
    """(loss per token, summed loss of each further depth) by hand, one document at a time."""
    ctx = ForwardContext(batch.packing, batch.n_real)
    assert model.mtp is not None and model.embed is not None
    states, table, head = model.states(batch, EMPTY, ctx), model.embed.weight, model.head_weight()
    loss = F.cross_entropy(states @ head.T, batch.labels, reduction="none")
    total = torch.zeros(CFG.mtp_layers, dtype=torch.float64)
    block = model.mtp
    for start, stop in zip(batch.packing.starts[:-1], batch.packing.starts[1:], strict=True):
        # Layers are causal, so tokens past the end cannot change a loss that counts: any ids will do.
        h, n = states[start:stop], int(stop - start)
        for k in range(1, CFG.mtp_layers + 1):
            tokens = torch.cat([batch.ids[start + k : stop], torch.full((min(k, n),), 3)])[:n]
            wanted = torch.cat([batch.labels[start + k : stop], torch.full((min(k, n),), IGNORE)])[:n]
            pair = [norm(table[tokens], block.embed_norm.weight), norm(h, block.hidden_norm.weight)]
            h = torch.cat(pair, 1) @ block.join.weight.T
            for layer in block.layers:
                h = layer(h, ForwardContext(Packing.of([n]), n))
            h = norm(h, block.norm.weight)
            of_one = F.cross_entropy(h @ head.T, wanted, ignore_index=IGNORE, reduction="sum")
            total = total + of_one * F.one_hot(torch.tensor(k - 1), CFG.mtp_layers)
    return loss, total


@pytest.mark.parametrize("tied", [False, True])
def test_multi_token_prediction_by_hand(tied: bool) -> None:
    cfg = replace(CFG, tied=tied)
    batch, _ = make_batch(Text((9, 1, 2, 13), 0, seed=4), cfg.vocab_size)
    batch = replace(batch, counts=Counts(mtp=(7, 3)))
    ours, hand = build(cfg), build(cfg)
    loss = ours(batch, EMPTY)
    weigh(loss).backward()
    plain, total = mtp_loss(hand, batch)
    torch.testing.assert_close(loss, plain, rtol=1e-9, atol=1e-12)
    mean = (total[0] / 7 + total[1] / 3) / 2
    (weigh(plain) + 0.4 * mean).backward()
    torch.testing.assert_close(ours.take_objectives()["mtp"], mean.detach(), rtol=1e-9, atol=1e-12)
    grads = [{n: p.grad for n, p, _ in declared(m)} for m in (ours, hand)]
    assert not far(*grads)


def test_tokens_ahead_may_come_with_the_batch() -> None:
    """As under context parallelism, where a rank does not hold them."""
    batch, _ = make_batch(Text((9, 4), 3, seed=4), CFG.vocab_size)
    given_ahead = replace(batch, ahead=ahead(batch.ids, batch.labels, batch.packing, CFG.mtp_layers))
    grads = []
    for b in (batch, given_ahead):
        model = build(CFG)
        model(b, EMPTY).sum().backward()
        grads.append({n: p.grad for n, p, _ in declared(model)})
    assert all(torch.equal(grads[0][n], g) for n, g in grads[1].items())


def test_multi_token_prediction_is_not_computed_without_learning() -> None:
    batch, _ = make_batch(Text((9, 4), 3, seed=4), CFG.vocab_size)
    model = build(CFG)
    with torch.no_grad():
        evaluated = model(batch, EMPTY)
    assert torch.equal(evaluated, build(replace(CFG, mtp_layers=0))(batch, EMPTY).detach())
    assert float(model.take_objectives()["mtp"]) == 0.0
