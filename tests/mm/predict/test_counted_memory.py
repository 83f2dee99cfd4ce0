"""What counts hold at moments that closed forms know: sums of gradients, states that cross cp, experts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mm.config.schema import from_mapping
from mm.plan.blueprint import draw_up
from mm.plan.made_up import made_up_index
from mm.predict.count.layers import layer_counts
from mm.predict.count.mamba import Scan
from mm.predict.count.pieces import How, chain, keeping
from mm.predict.count.rank import RankCounts, count_rank
from mm.predict.count.scan import Inputs, added_states, into_chunks, state_after
from mm.predict.count.sizes import Degrees
from mm.predict.count.tape import Tape
from mm.predict.step import drawn_plans
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
