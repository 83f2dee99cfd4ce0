"""Faults of what a run does with numbers that are not finite, with copies and with batches to leave out."""

from __future__ import annotations

from tests.mutations.fault import Fault

GUARD = "tests/mm/train/test_guard.py::test_"
COPIES = "tests/mm/train/test_replicas.py::test_"
SKIPS = "tests/mm/order/test_skips.py::test_"

NUMERICS = (
    Fault(
        "update.finite",
        "gradients that are not finite are applied",
        "mm/train/update.py",
        "if math.isfinite(norm + sum(",
        "if bool(norm + sum(",
        "tests/mm/jobs/test_in_process.py::test_a_gradient_that_is_not_finite_updates_nothing",
    ),
    Fault(
        "update.loads",
        "tokens of a step that was left out count for the experts of the next",
        "mm/train/update.py",
        "        layer.load.zero_()",
        "        layer.load.add_(0)",
        f"{GUARD}nothing_of_a_step_that_is_left_out_enters_the_next",
    ),
    Fault(
        "blame.order",
        "what a number has spoilt is named in the place of where it came from",
        "mm/train/blame.py",
        "for spot, text in SPOTS.items():",
        "for spot, text in reversed(SPOTS.items()):",
        "tests/mm/train/test_blame.py::test_the_origin_comes_before_what_it_spoils",
    ),
    Fault(
        "blame.inputs",
        "inputs that are not finite are the module's fault",
        "mm/train/trail.py",
        "inputs=self._inputs()[:TOLD],",
        "inputs=self._inputs()[:0],",
        "tests/mm/jobs/test_in_process.py::test_a_gradient_that_is_not_finite_updates_nothing",
    ),
    Fault(
        "checkpoint.poison",
        "weights that are not finite are saved",
        "mm/checkpoint/writer.py",
        "            if wrong:",
        "            if False:",
        f"{GUARD}weights_that_are_not_finite_are_not_saved",
    ),
    Fault(
        "checkpoint.poisoned",
        "a run goes on from weights that are not finite",
        "mm/checkpoint/newest.py",
        "        if not found:",
        "        if found or True:",
        f"{GUARD}a_poisoned_checkpoint_is_named_and_an_older_one_is_taken",
    ),
    Fault(
        "guard.window",
        "steps that were left out are forgotten at once",
        "mm/train/guard.py",
        "if s > step - WINDOW]",
        "if s > step]",
        f"{GUARD}a_bound_holds_over_resumes",
    ),
    Fault(
        "guard.row",
        "high steps need not follow each other",
        "mm/train/guard.py",
        "self.high, self.losses = 0, [",
        "self.high, self.losses = self.high, [",
        f"{GUARD}a_jump_is_so_many_high_steps_in_a_row",
    ),
    Fault(
        "guard.back",
        "a run that goes back takes the same batches again",
        "mm/train/loop.py",
        "drawn=replace(state.drawn, left_out=left_out)",
        "drawn=replace(state.drawn)",
        f"{GUARD}a_run_that_goes_back_is_one_that_left_the_batches_out",
    ),
    Fault(
        "skips.count",
        "the last batch of a range is not left out",
        "mm/order/skips.py",
        "step += last - first + 1",
        "step += last - first",
        f"{SKIPS}a_step_takes_the_next_batch_that_is_not_left_out",
    ),
    Fault(
        "skips.packed",
        "packed batches are never left out",
        "mm/plan/batches.py",
        "for _ in range(self.skips.before(step), self.skips.batch(step)):",
        "for _ in range(0):",
        f"{SKIPS}samples_are_those_of_the_batches_that_stay_packed_or_not",
    ),
    Fault(
        "skips.kept",
        "a run that resumes forgets which batches it has left out",
        "mm/ranks/feed.py",
        "self.drawn.after(prepared.plan, self.skips)",
        "self.drawn.after(prepared.plan)",
        f"{GUARD}a_batch_that_breaks_a_run_is_left_out_for_good",
    ),
    Fault(
        "replicas.odd",
        "a flipped sign does not change a hash",
        "mm/train/replicas.py",
        "* 2 + 1) * factor",
        "* 2 + 2) * factor",
        f"{COPIES}a_change_of_one_bit_changes_the_hash",
    ),
    Fault(
        "replicas.ends",
        "tied weights of the two ends of a pipeline are not compared",
        "mm/train/replicas.py",
        "{'ends' if tied else pp}",
        "{pp}",
        f"{COPIES}copies_are_equal_until_a_bit_flips[ends of a pipeline, sharded]",
    ),
)
