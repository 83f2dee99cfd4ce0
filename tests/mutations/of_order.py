"""Faults of the order of samples, of packing and of balance."""

from __future__ import annotations

from tests.mutations.fault import Fault

ORDER = (
    Fault(
        "order.epochs",
        "every epoch is the first",
        "mm/order/stream.py",
        "shuffled(keyed(self._keys[k], epoch)",
        "shuffled(keyed(self._keys[k], 0 * epoch)",
        "tests/mm/order/test_stream.py::test_epochs_differ_and_so_do_seeds_and_sources",
    ),
    Fault(
        "order.quota",
        "a blend takes a source before its quota allows it",
        "mm/order/blend.py",
        "while waiting and waiting[0][0] <= position:",
        "while waiting:",
        "tests/mm/order/test_blend.py::test_every_source_is_in_its_quota_after_any_positions",
    ),
    Fault(
        "order.cursor",
        "a step begins at the window of the step before",
        "mm/plan/batches.py",
        "                window, at = window + 1, 0",
        "                window, at = window, 0",
        "tests/mm/order/test_packing.py::test_a_run_goes_on_alike_from_any_step",
    ),
    Fault(
        "order.room",
        "a sample goes to the sequence with most room",
        "mm/order/packing.py",
        "left, k = room.pop(at)",
        "left, k = room.pop()",
        "tests/mm/order/test_packing.py::test_best_fit_is_what_it_says",
    ),
    Fault(
        "plan.already",
        "items are dealt as if their ranks had nothing else to do",
        "mm/plan/dealing.py",
        "spread = longest_first(cost, microbatch, already)",
        "spread = longest_first(cost, microbatch, 0 * already)",
        "tests/mm/plan/test_dealing.py::test_items_fill_what_ranks_have_left",
    ),
    Fault(
        "order.bad",
        "an unreadable sample is drawn again",
        "mm/order/stream.py",
        'hashes = keyed(key_of(self._keys[k], "in the place of", turn), positions[own])',
        "hashes = keyed(key_of(self._keys[k], len(bad), turn), positions[own])",
        "tests/mm/order/test_stream.py::test_a_bad_sample_moves_no_other",
    ),
    Fault(
        "order.phase",
        "weights of a phase go to the sources without a bound",
        "mm/plan/phases.py",
        "(now if k == here else [0.0] * len(now))",
        "(now if k == len(starts) - 1 else [0.0] * len(now))",
        "tests/mm/plan/test_phases.py::test_a_run_begins_with_short_samples",
    ),
    Fault(
        "order.short",
        "a bound on lengths forgets the split of its source",
        "mm/plan/phases.py",
        "own if r.bits is None else own & r.bits",
        "own",
        "tests/mm/plan/test_phases.py::test_a_run_begins_with_short_samples",
    ),
    Fault(
        "order.left_out",
        "a phase draws samples that the config leaves out",
        "mm/plan/phases.py",
        "which = which[~np.isin(which, left_out)]",
        "which = which[~np.isin(which, left_out[:0])]",
        "tests/mm/plan/test_phases.py::test_lengths_are_those_of_truncated_samples_and_none_is_left_out",
    ),
)
