"""What models may have beside their sizes, counted as the code that runs does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.predict.count.layers import layer_counts, like
from mm.predict.count.load import axis_of
from mm.predict.count.moe import own_rows
from mm.predict.count.packed import attended, in_windows, window_crossing, windowed
from mm.predict.count.pieces import How
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Low
from mm.predict.count.weights import gather_messages, owned
from mm.predict.hardware import load_hardware
from mm.predict.price import share_of_peak
from mm.virtual.values import drawn_choices
from parallel.context_parallel import ContextPacking, pack
from parallel.schedule.action import BACKWARD, FORWARD, Action
from parallel.sequence.buckets import Pairing
from parallel.sequence.stream import Order
from parallel.topology.data_parallel import POLICIES
from tests.mm.harness import CONFIGS, small
from tests.mm.predict.test_tape import CFG, LENGTHS, load_of

CPU = torch.device("cpu")
EXPERTS = replace(CFG, pattern="E", n_experts=4, top_k=2, expert_ffn=64)


def shapes(pairing: Pairing) -> tuple[list[tuple[int, ...]], int, bool]:
    """Of a pairing's buckets; bytes of its numbers and masks; whether rows are the batch as they lie."""
    found, held = [], 0
    for b in pairing.buckets:
        found.append((*b.queries.shape, b.keys.shape[1], len(b.rows), b.window))
        given = [b.queries, b.rows, b.slots, b.mask, None if b.keys is b.queries else b.keys]
        held += sum(x.numel() * x.element_size() for x in given if x is not None)
    return found, held, pairing.one_batch


def counted(pairing: Pairing, queries: list[int], keys: list[int], window: int) -> None:
    here = in_windows(queries, keys, window)
    found = [(b.n, b.queries, b.keys, b.real, b.window) for b in here.buckets]
    assert (found, here.indices, here.one_batch) == shapes(pairing)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_windows_are_cut_as_they_are_attended(documents: list[tuple[int, int]], window: int) -> None:
    queries = [n for n, _ in documents]
    keys = [n + (more % window if n else 0) for n, more in documents]
    if any(queries):
        counted(Pairing.windowed(queries, keys, window, CPU), queries, keys, window)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("rank", range(2))
def test_windows_over_cp_take_the_keys_that_own_queries_see(order: Order, rank: int) -> None:
    lengths, window = [150, 90, 60, 100], 40
    packing = pack(lengths, CPU, axis_of("cp", 2, rank), order)
    assert isinstance(packing, ContextPacking)
    own = {int(row) for row in packing.rows}
    first = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    seen = {key for row in own for key in range(max(int(first[row]), row - window + 1), row + 1)}
    here = window_crossing(packing, window)
    assert here.before is not None and here.before.takes == len(seen - own)
    assert sum(b.real for b in here.attended.buckets) == len(own)


def test_windows_of_equal_documents_follow_from_their_buckets() -> None:
    assert windowed(attended([70] * 3, [70] * 3), 16).attended == in_windows([70] * 3, [70] * 3, 16)


def test_a_window_leaves_out_the_keys_beyond_it_and_layers_without_one_do_not() -> None:
    cfg = replace(CFG, pattern="***", window=4, window_layers=(0, 2))
    found = [layer_counts(cfg, "*", k, Degrees("llm"), load_of([256]), How()).forward.flops for k in range(3)]
    assert found[0] == found[2] < found[1] and [like(cfg, k) for k in range(3)] == [0, 1, 0]


@pytest.mark.parametrize("rows", [7, 16, 101])
def test_rows_of_experts_are_those_of_an_even_choice(rows: int) -> None:
    chosen = np.bincount(drawn_choices(rows, 1, 8, 1.0).ravel(), minlength=8).reshape(4, 2).sum(1)
    every = [own_rows(rows, 8, Degrees("llm", ep=4, ep_rank=r)) for r in range(4)]
    assert every == chosen.tolist() and own_rows(rows, 8, Degrees("llm", ep=4)) == rows / 4


def test_the_gradient_of_experts_weights_is_as_efficient_a_product_as_their_forward() -> None:
    hardware = load_hardware("h100")
    cfg = replace(EXPERTS, n_experts=64, d_model=2048, expert_ffn=1024)
    found = layer_counts(cfg, "E", None, Degrees("llm"), load_of([20_000]), How())
    works = found.forward, found.backward_input, found.backward_weight
    shares = [{share_of_peak(k, hardware) for k in w.kernels if k.kind == "grouped"} for w in works]
    assert len(shares[0]) == 1 and shares[0] == shares[1] == shares[2]  # the same rows an expert in each


def test_the_all_gather_dispatcher_moves_all_tokens_to_every_rank() -> None:
    cfg, load, at = replace(EXPERTS, dispatcher="all_gather"), load_of(LENGTHS), Degrees("llm", ep=2)
    found = layer_counts(cfg, "E", None, at, load._replace(widest=40), How())
    sent = {(m.op, m.bytes) for m in found.forward.messages}
    rows = 2 * 40 * CFG.d_model * 2  # padded tokens of both ranks, in bfloat16
    assert {("all_gather", rows), ("reduce_scatter", rows)} < sent and "all_to_all" not in dict(sent)


def test_a_layer_that_is_computed_again_keeps_its_choice_of_experts_and_asks_nobody_twice() -> None:
    cfg, load, at = replace(EXPERTS, dispatcher="all_gather"), load_of(LENGTHS), Degrees("llm", ep=2)
    load, again = load._replace(widest=40), How(recompute=frozenset({"full"}))
    found = layer_counts(cfg, "E", None, at, load, again)
    chosen = ("all_gather", 2 * 40 * 2 * 8)  # two choices a token, of both ranks
    asked = [[(m.op, m.bytes) for m in w.messages] for w in (found.forward, found.backward_input)]
    assert chosen in asked[0] and chosen not in asked[1]
    alone = layer_counts(EXPERTS, "E", None, Degrees("llm"), load, again)
    assert alone.kept == load.tokens * (2 * CFG.d_model + 8 * 4 + 8 * 2)  # what entered, scores' order, rows'


def test_routers_have_no_adapters() -> None:
    cfg, load, at = replace(EXPERTS, shared_ffn=0), load_of(LENGTHS), Degrees("llm")
    frozen = layer_counts(cfg, "E", None, at, load, How(trains=False))
    found = layer_counts(cfg, "E", None, at, load, How(trains=False, low=Low(2, ("all-linear",))))
    assert found.gradients == 0 and found.kept == frozen.kept


def test_adapters_have_gradients_in_the_place_of_weights_and_their_sums_are_kept() -> None:
    load, at, low = load_of(LENGTHS), Degrees("llm"), Low(2, ("all-linear",))
    frozen = layer_counts(CFG, "-", None, at, load, How(trains=False))
    found = layer_counts(CFG, "-", None, at, load, How(trains=False, low=low))
    weights = 2 * CFG.d_model * CFG.mlp_ffn
    assert frozen.gradients == 0 and found.gradients == 2 * 2 * 2 * (CFG.d_model + CFG.mlp_ffn)
    inputs = load.tokens * CFG.d_model  # of up; the activation keeps that of down
    assert found.kept - frozen.kept == 2 * (weights + inputs)
    some = layer_counts(CFG, "-", None, at, load, How(trains=False, low=Low(2, ("up",))))
    assert some.gradients == found.gradients / 2


def test_weights_of_a_rank_without_tokens_have_gradients_all_the_same() -> None:
    some, none = (layer_counts(CFG, "*", None, Degrees("llm"), load_of(n), How()) for n in (LENGTHS, []))
    assert none.gradients == some.gradients > 0


def test_experts_of_multi_token_prediction_are_gathered_once_more_a_depth() -> None:
    found = [gathered(depths) for depths in (1, 3)]
    assert found[1] == found[0] + 2 > 2


def gathered(depths: int) -> float:
    """How often a step gathers units of experts, of which one is in the block of multi-token prediction."""
    raw = small(layout={"llm": {"data_parallel": "zero3", "ep": 2}})
    raw["model"] = {"llm": raw["model"]["llm"] | {"pattern": "E*", "mtp_layers": depths, "mtp_pattern": "*E"}}
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    units = [o for o in owned(blueprint, "llm", 0) if o.unit.shards == 2]
    actions = [Action(kind, "llm", 0, 0) for kind in (FORWARD, BACKWARD)]
    return sum(m.times for m in gather_messages(units, "llm", POLICIES["zero3"], actions))
