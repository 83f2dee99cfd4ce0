"""Faults of counts."""

from __future__ import annotations

from tests.mutations.fault import Fault

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
        "that a window is counted as none is not said",
        "mm/predict/count/left_out.py",
        "if llm.window is not None:",
        "if llm.window is None and llm.kv_rank is not None:",
        "tests/mm/predict/test_left_out.py::test_what_is_left_out_is_said",
    ),
)
