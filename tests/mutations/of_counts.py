"""Faults of counts."""

from __future__ import annotations

from tests.mutations.fault import Fault

SWITCHES = "tests/mm/predict/test_counted_switches.py::test_"
MEMORY = "tests/mm/predict/test_counted_memory.py::test_"

COUNTS = (
    Fault(
        "counts.copies",
        "a sum of gradients over one rank is not copied by way of a third tensor",
        "mm/predict/count/memory.py",
        "copies = 1 + (unit.shards == 1)",
        "copies = 1",
        MEMORY + "a_sum_over_one_rank_is_there_three_times",
    ),
    Fault(
        "counts.narrowed",
        "sums are copied into the dtype that they have",
        "mm/predict/count/ops.py",
        "return wide if item == t.acc else _like(t, n, item, [wide])",
        "return _like(t, n, item, [wide])",
        MEMORY + "convolutions_in_the_dtype_of_sums_copy_nothing",
    ),
    Fault(
        "counts.between",
        "the sum of experts is gone when it is over",
        "mm/predict/count/memory.py",
        "last = buffers / max(1, len(units)) if done",
        "last = 0.0 if done",
        MEMORY + "the_sum_of_experts_is_there_until_the_next_one",
    ),
    Fault(
        "counts.cores",
        "cores compute attention over cp in tiles",
        "mm/predict/count/crossing.py",
        "return _kernel_back(t, h, sizes)",
        "pass",
        MEMORY + "cores_have_kernels_for_the_slope_of_silu_and_attention_over_cp",
    ),
    Fault(
        "counts.slope",
        "cores compute the slope of SiLU in six operations",
        "mm/predict/count/ops.py",
        "passes=1 if t.host else 6",
        "passes=6",
        MEMORY + "cores_have_kernels_for_the_slope_of_silu_and_attention_over_cp",
    ),
    Fault(
        "counts.states",
        "a scan over cp keeps no copy of what its chunks add",
        "mm/predict/count/scan.py",
        "saved = t.save(copied)",
        "saved = t.save(None)",
        MEMORY + "the_state_after_a_piece_keeps_a_copy_of_what_its_chunks_add",
    ),
    Fault(
        "counts.experts",
        "gradients of experts below a layer are summed before it",
        "mm/predict/count/pieces.py",
        "        done -= p.experts\n",
        "",
        MEMORY + "experts_below_are_not_done_while_a_layer_above_them_is",
    ),
    Fault(
        "counts.entered",
        "hidden states that enter a stage behind its indices count twice",
        "mm/predict/count/pieces.py",
        "next((p.holds_input for p in pieces if p.out or p.gradients), 0.0)",
        "pieces[0].holds_input if pieces else 0.0",
        MEMORY + "what_entered_a_stage_is_known_behind_what_it_only_keeps",
    ),
    Fault(
        "counts.words",
        "that a bound of scores is counted as none is not said",
        "mm/predict/count/left_out.py",
        "if llm.attention_cap is not None or llm.attention_sinks:",
        "if llm.attention_cap is not None and llm.attention_sinks:",
        "tests/mm/predict/test_left_out.py::test_what_is_left_out_is_said",
    ),
    Fault(
        "counts.windows",
        "blocks of a window are counted without the keys before them",
        "mm/predict/count/packed.py",
        "buckets += _pieces(size, 0 * size, size + window - 1, 0 * size, window)",
        "buckets += _pieces(size, 0 * size, size, 0 * size, window)",
        SWITCHES + "windows_are_cut_as_they_are_attended",
    ),
    Fault(
        "counts.rows",
        "rows that experts do not share evenly go to none of them",
        "mm/predict/count/moe.py",
        "return each * own + min(max(rest - at.ep_rank * own, 0), own)",
        "return each * own",
        SWITCHES + "rows_of_experts_are_those_of_an_even_choice",
    ),
    Fault(
        "counts.experts-gradient",
        "the products that give gradients of experts' weights are priced as if no expert had many rows",
        "mm/predict/count/moe.py",
        """t.kind = t.kind, BACKWARD_WEIGHT
            t.kernel("grouped", (experts, rows, w.out, w.into)""",
        """t.kind = t.kind, BACKWARD_WEIGHT
            t.kernel("grouped", (experts, w.out, w.into, rows)""",
        SWITCHES + "the_gradient_of_experts_weights_is_as_efficient_a_product_as_their_forward",
    ),
    Fault(
        "counts.widest",
        "the all_gather dispatcher is counted without padding",
        "mm/predict/count/moe.py",
        "load.widest or real",
        "real",
        SWITCHES + "the_all_gather_dispatcher_moves_all_tokens_to_every_rank",
    ),
    Fault(
        "counts.adapters",
        "inputs of adapted maps are not kept",
        "mm/predict/count/ops.py",
        "x.store if t.trains or adapters else None",
        "x.store if t.trains else None",
        SWITCHES + "adapters_have_gradients_in_the_place_of_weights_and_their_sums_are_kept",
    ),
    Fault(
        "counts.depths",
        "experts of multi-token prediction are gathered as often as others",
        "mm/predict/count/weights.py",
        "n += (depths - 1) * more",
        "n += 0 * more",
        SWITCHES + "experts_of_multi_token_prediction_are_gathered_once_more_a_depth",
    ),
    Fault(
        "counts.nobody",
        "attention to no rows ends the graph",
        "mm/predict/count/attention.py",
        "lambda g: [g[0]] * 3, [])",
        "lambda g: [None] * 3, [])",
        SWITCHES + "weights_of_a_rank_without_tokens_have_gradients_all_the_same",
    ),
    Fault(
        "counts.gathered",
        "what GATHER has brought counts twice in the forward that waits for it",
        "mm/predict/count/memory.py",
        """        gathers = ("whole", *key) not in self.held
""",
        """        gathers = True
""",
        MEMORY + "what_a_step_gathers_at_once_is_not_there_twice",
    ),
    Fault(
        "counts.choice",
        "a layer that is computed again chooses its experts again",
        "mm/predict/count/moe.py",
        "    if not choice:\n        choice +=",
        "    if True:\n        choice[:] =",
        SWITCHES + "a_layer_that_is_computed_again_keeps_its_choice_of_experts_and_asks_nobody_twice",
    ),
    Fault(
        "counts.router",
        "routers have adapters",
        "mm/predict/count/moe.py",
        "cfg.d_model, adapts=False)",
        "cfg.d_model)",
        SWITCHES + "routers_have_no_adapters",
    ),
    Fault(
        "counts.freed",
        "the virtual rank holds weights of one data rank beside their gradients",
        "mm/virtual/ledger.py",
        """        if entry.site.fsdp:
            self.look_again()""",
        """        if entry.site.fsdp and entry.kind:
            self.look_again()""",
        "tests/mm/virtual/test_recorder.py::"
        "test_weights_of_one_rank_are_freed_where_fsdp_goes_on_without_an_operation_of_its_own",
    ),
    Fault(
        "counts.subsampled",
        "each stride of a FastConformer's convolutions is taken to halve one of two dims",
        "encoders/fastconformer.py",
        "(rows * 2.0 ** (2 - i) * mels / 2 ** (i + 1) for",
        "(rows * 4.0 ** (2 - i) * mels / 2 ** (i + 1) for",
        "tests/encoders/test_encoders.py::test_a_subsampled_clip_costs_the_products_that_torch_counts",
    ),
)
