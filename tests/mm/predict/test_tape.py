"""Computations on sizes: what is kept, what comes and goes, and laws that any layer obeys."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from llm.config import LLMConfig
from llm.model import LLM, LLMBatch, loss_rows
from mm.predict.count import ops
from mm.predict.count.layers import first_counts, last_counts, layer_counts
from mm.predict.count.ops import Weight
from mm.predict.count.packed import attended
from mm.predict.count.pieces import How, chain, piece
from mm.predict.count.sizes import Degrees, TokenLoad
from mm.predict.count.tape import Tape, Var
from parallel.sequence.packed import Packing

CFG = LLMConfig(pattern="*-", d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, mlp_ffn=64, vocab_size=64)
LENGTHS = [16, 16]


def load_of(lengths: list[int]) -> TokenLoad:
    tokens = sum(lengths)
    return TokenLoad(tokens, tokens, len(lengths), attended(lengths, lengths), (tokens - len(lengths),))


def test_products_of_a_model_are_those_that_torch_counts() -> None:
    load, how, at = load_of(LENGTHS), How(item=4), Degrees("llm")
    parts = [first_counts(CFG, at, load.tokens, (), how)]
    parts += [layer_counts(CFG, symbol, None, at, load, how) for symbol in CFG.symbols]
    whole = chain([*parts, last_counts(CFG, at, load, how)])
    model, tokens = LLM(CFG), torch.zeros(load.tokens, dtype=torch.int64)
    labels = tokens.clone()
    labels[[15, 31]] = -100
    batch = LLMBatch(tokens, labels, Packing.of(LENGTHS), load.tokens, {}, loss_rows=loss_rows(labels))
    with FlopCounterMode(display=False) as counted:
        model(batch, {}).sum().backward()
    attention = [k for k in (*whole.forward.kernels, *whole.backward.kernels) if k.kind == "attention"]
    others = whole.forward.flops + whole.backward.flops - sum(k.flops * k.times for k in attention)
    by_name = {str(op): n for op, n in counted.get_flop_counts()["Global"].items()}
    theirs = sum(n for name, n in by_name.items() if "attention" not in name)
    assert others == theirs


def test_what_is_computed_again_is_not_kept_and_costs_no_last_product() -> None:
    load, at = load_of(LENGTHS), Degrees("llm")
    plain = layer_counts(CFG, "-", None, at, load, How())
    again = layer_counts(CFG, "-", None, at, load, How(recompute=frozenset({"full"})))
    assert again.kept == load.tokens * CFG.d_model * 2 < plain.kept
    assert again.forward == plain.forward
    # Of the two products the second ends the computation: nothing needs its result.
    assert again.backward.flops == plain.backward.flops + plain.forward.flops / 2


def test_halves_are_the_whole_and_keep_factors_between() -> None:
    load, at = load_of(LENGTHS), Degrees("llm")
    whole, halves = (layer_counts(CFG, "-", None, at, load, How(halves=h)) for h in (False, True))
    assert halves.backward.flops == whole.backward.flops
    assert whole.later == 0 < halves.later and halves.gradients < whole.gradients


def test_memory_counts_as_long_as_something_refers_to_it() -> None:
    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        y = ops.linear(t, x, Weight("w", 3, 5))
        assert sum(t.live) == 2 * (7 * 5 + 7 * 3)
        return ops.squared_relu(t, y)

    found = piece(How(), lambda t: t.var(7, 5), compute)
    assert found.kept == 2 * (7 * 5 + 7 * 3)  # of the product its input, of the activation its output
    assert found.out == 2 * 7 * 3 and found.gradients == 2 * 3 * 5
    assert found.in_forward.total == 2 * (7 * 5 + 2 * 7 * 3)
    assert found.backward_weight.flops == found.backward_input.flops == 2 * 7 * 5 * 3


def test_tensor_parallel_ranks_split_products_and_send_what_they_share() -> None:
    load = load_of(LENGTHS)
    alone = layer_counts(CFG, "-", None, Degrees("llm", tp=1), load, How())
    split = layer_counts(CFG, "-", None, Degrees("llm", tp=2), load, How())
    sharded = layer_counts(CFG, "-", None, Degrees("llm", tp=2, sequence_parallel=True), load, How())
    assert split.forward.flops * 2 == alone.forward.flops and not alone.forward.messages
    assert [m.op for m in split.forward.messages] == ["all_reduce"]
    assert sorted(m.op for m in sharded.forward.messages) == ["all_gather", "reduce_scatter"]
    assert sharded.kept < split.kept < alone.kept
