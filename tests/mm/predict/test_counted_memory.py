"""What counts hold at moments that closed forms know: sums of gradients, states that cross cp, experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.plan.made_up import made_up_index
from mm.predict.count import ops
from mm.predict.count.convolution import convolve
from mm.predict.count.crossing import Heads, outer
from mm.predict.count.head import loss
from mm.predict.count.layers import layer_counts
from mm.predict.count.mamba import Scan
from mm.predict.count.memory import _Walk
from mm.predict.count.packed import attended
from mm.predict.count.pieces import How, Level, chain, keeping, piece
from mm.predict.count.rank import RankCounts, count_rank
from mm.predict.count.rank_plan import RankPlan
from mm.predict.count.scan import Inputs, added_states, into_chunks, state_after
from mm.predict.count.sizes import Crossing, Degrees, Rows
from mm.predict.count.tape import Tape, Var
from mm.predict.step import drawn_plans
from parallel.topology.groups import Group
from tests.mm.harness import CONFIGS, small
from tests.mm.predict.test_tape import CFG, LENGTHS, load_of

EXPERTS = replace(CFG, pattern="E-", n_experts=4, top_k=2, expert_ffn=64)


def counted(policy: str, lora: dict[str, Any]) -> tuple[RankCounts, int]:
    """A rank of a language model on four data ranks with few tokens, and bytes of its whole weights."""
    raw = small(layout={"llm": {"data_parallel": policy}}, schedule={"microbatches": 1})
    raw["train"] |= {"dtype": "bfloat16", "global_batch": 4, "recompute": True, "lora": lora}
    raw["data"] |= {"context": 16, "synthetic": {}}
    llm = {"pattern": "*-", "vocab_size": 4096, "loss_chunk": 64, "mlp_ffn": 256, "mtp_layers": 0}
    raw["model"] = {"llm": {**raw["model"]["llm"], **llm}}
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    plan = drawn_plans(blueprint, made_up_index(blueprint), 1)[0]
    whole = sum(math.prod(w.shape) for unit in blueprint.weights("llm", 0) for w in unit) * 4
    return count_rank(blueprint, plan, 1), whole


def test_a_sum_over_one_rank_is_there_three_times() -> None:
    """torch.distributed.fsdp's foreach_reduce: what is summed, a quotient of it, and its copy."""
    found, whole = counted("replicate", {})
    assert found.during.startswith("backward(llm") and found.kinds["communication"] == 3 * whole


def test_what_a_step_gathers_at_once_is_not_there_twice() -> None:
    """torch.distributed.fsdp's wait_for_unshard: only a gather that a forward waits for is kept beside it."""
    kept = [counted(policy, {"llm": {"rank": 2}})[0].kinds for policy in ("step", "zero3")]
    assert kept[0].get("communication", 0) < kept[0]["gathered_parameters"] / 8
    assert kept[1]["communication"] >= kept[1]["gathered_parameters"] > 0


@pytest.mark.parametrize("item", [2, 4])
def test_sums_of_the_loss_are_copied_into_another_dtype_alone(item: int) -> None:
    n, cfg = 48, replace(CFG, vocab_size=80)
    v, d = cfg.vocab_size, cfg.d_model

    def compute(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return loss(t, x, cfg, Degrees("llm"), n, n, known=False)

    found = piece(How(item=item), lambda t: t.var(n, d), compute)
    # In float32 exponentials and their slope, and the gradient of the head; products and what they give.
    beside = 4 * n * v + 4 * v * d + item * (n * d + v * d)
    assert found.in_backward.total - found.kept == beside + (2 * n * v if item == 2 else 0)
    assert found.gradients == item * v * d


def test_convolutions_in_the_dtype_of_sums_copy_nothing() -> None:
    n, width, taps = 50, 6, 4

    def peak(item: int) -> float:
        t = Tape(item)
        x = t.var(n, width, item)
        before = sum(t.live)
        convolve(t, x, taps, 1, causal=True)
        return t.peak - before

    rows = (n + taps - 1) * width
    assert peak(4) == 4 * (rows + n * width)  # rows with room, and the result
    assert peak(2) == 2 * (rows + n * width) + 4 * (rows + n * width)


def test_cores_have_kernels_for_the_slope_of_silu_and_attention_over_cp() -> None:
    n, h = 64, Heads(8, 4, 16)
    crossing = Crossing(False, (n,), (((n, n),),), (n,), Rows(n, n, n), (), attended([], []), 1)

    def slope(t: Tape, x: Var | None) -> Var:
        assert x is not None
        return ops.silu(t, x)

    def attention(t: Tape, x: Var | None) -> Var:
        assert x is not None
        kv = t.var(n, h.kv * h.dim)
        return outer(t, (x, kv, kv), h, crossing, Group("module", "llm", "cp"))

    def most(compute: Callable[[Tape, Var | None], Var], host: bool) -> float:
        found = piece(How(item=4, host=host), lambda t: t.var(n, h.own * h.dim), compute)
        return found.in_backward.total - found.kept

    assert most(slope, True) == 2 * n * h.own * h.dim * 4  # the gradient that comes and that of the input
    assert most(attention, False) - most(attention, True) > 2 * h.own * n * n * 4  # no scores


class Seen(_Walk):
    """Knows what messages take at the moments of a backward between one layer of experts and the next."""

    def __init__(self, rank: RankPlan) -> None:
        super().__init__(rank)
        self.between: list[float] = []

    def _look(self, now: Level, during: str, more: Mapping[str, float] | None = None) -> None:
        if now.done and not now.ending:
            self.between.append((more or {}).get("communication", 0.0))
        super()._look(now, during, more)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sum_of_experts_is_there_until_the_next_one(dtype: str) -> None:
    """torch.distributed.fsdp's reduce_scatter_states; of bfloat16 the router's sum follows."""
    raw = small(layout={"llm": {"ep": 2}}, schedule={"microbatches": 1})
    raw["train"] |= {"dtype": dtype, "global_batch": 4}
    raw["data"] |= {"context": 16, "synthetic": {}}
    sizes = {"pattern": "*E*E", "n_experts": 4, "top_k": 2, "expert_ffn": 64, "mtp_layers": 0}
    raw["model"] = {"llm": {**raw["model"]["llm"], **sizes}}
    blueprint = draw_up(from_mapping(raw, CONFIGS), 4)
    seen = Seen(RankPlan(blueprint, drawn_plans(blueprint, made_up_index(blueprint), 1)[0], 0))
    seen.run()
    experts = [w for w in blueprint.weights("llm", 0) if w[0].expert]
    one = sum(math.prod(w.shape) for w in experts[0]) * 4
    assert set(seen.between) == {one if dtype == "float32" else 0.0}


def test_the_state_after_a_piece_keeps_a_copy_of_what_its_chunks_add() -> None:
    t, s = Tape(2), Scan(heads=4, dim=8, groups=2, state=16, chunk=8)
    x = t.var(30, s.inner, 4)
    t.leaf(x)
    parts = (x, t.var(30, s.heads, 4), *(t.var(30, s.groups * s.state, 4) for _ in range(2)))
    chunks = into_chunks(t, Inputs(*parts), s, 30)
    added = added_states(t, chunks, 4)
    before = sum(t.live)
    end = state_after(t, chunks, added)
    assert added.n == 4 * s.inner * s.state
    assert sum(t.live) - before == 4 * added.n + end.bytes and end.n == s.inner * s.state + s.heads


def test_experts_below_are_not_done_while_a_layer_above_them_is() -> None:
    load, at, how = load_of(LENGTHS), Degrees("llm", ep=2), How()
    experts, dense = (layer_counts(EXPERTS, symbol, None, at, load, how) for symbol in "E-")
    assert experts.experts == 2 * 64 * 32 * 2 * 2 and dense.experts == 0
    assert {now.done for now in chain([experts, dense]).moments} == {0.0}
    assert max(now.done for now in chain([dense, experts]).moments) == experts.experts


def test_what_entered_a_stage_is_known_behind_what_it_only_keeps() -> None:
    again = layer_counts(CFG, "-", None, Degrees("llm"), load_of(LENGTHS), How(recompute=frozenset({"full"})))
    assert chain([keeping(64.0), again]).holds_input == again.holds_input == 32 * 32 * 2
