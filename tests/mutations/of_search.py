"""Faults of the search of layouts."""

from __future__ import annotations

from tests.mutations.fault import Fault

RAGGED = "tests/mm/search/test_ragged.py::"
FINDER = "tests/mm/search/test_finder.py::"
POLISH = "tests/mm/search/test_polish.py::"

SEARCH = (
    Fault(
        "bound.median",
        "bounds price the heaviest micro-batch in the place of the median one",
        "mm/search/tokens.py",
        "median = order[microbatches // 2]",
        "median = order[-1]",
        RAGGED + "test_the_language_model_takes_what_a_prediction_has_it_take",
    ),
    Fault(
        "bound.gradients",
        "gradients are taken to be there while the most activations are",
        "mm/search/bound.py",
        "held + flying * keeps, held + gradients + later * own",
        "held + gradients + flying * keeps",
        RAGGED + "test_gradients_come_once_activations_go",
    ),
    Fault(
        "bound.tail",
        "the gradients' way back is taken to be that of all stages",
        "mm/search/bound.py",
        "tail = last * sum(sink.early[:pp])",
        "tail = last * sum(sink.early)",
        "tests/mm/search/test_bound.py::test_the_bound_of_an_even_pipeline_is_its_step",
    ),
    Fault(
        "bound.heaviest",
        "the micro-batch with most is taken to have all of an encoder's load",
        "mm/search/bound.py",
        "return self.mean * (sum(self.forward) + sum(self.early))",
        "return 2 * self.mean * (sum(self.forward) + sum(self.early))",
        "tests/mm/search/test_bound.py::test_a_micro_batch_of_an_encoder_goes_through_all_its_stages_and_back",
    ),
    Fault(
        "bound.floor",
        "of undecided encoders only those on all ranks of the language model count",
        "mm/search/bound.py",
        "floor.first + every + first, others.own[0]",
        "floor.first + every, others.own[0]",
        "tests/mm/search/test_bound.py::test_floors_are_the_bounds_of_a_sink_of_whose_encoders_nothing_is_decided",
    ),
    Fault(
        "bound.halves",
        "sums hide behind a whole backward where it is split",
        "mm/search/weights.py",
        "np.maximum(0.0, total - late)",
        "np.maximum(0.0, total - backward)",
        RAGGED + "test_sums_outlast_the_half_of_a_backward_that_they_are_in",
    ),
    Fault(
        "first.proof",
        "the cheapest leaf that was asked for is taken for the best",
        "mm/search/first.py",
        "heapq.heappush(queue, (cost, 1, branch.key, branch))",
        "heapq.heappush(queue, (0.0, 1, branch.key, branch))",
        "tests/mm/search/test_tree.py::test_the_best_few_are_those_of_asking_for_all",
    ),
    Fault(
        "finder.worse",
        "a change that is worse is taken for one that helps",
        "mm/search/finder.py",
        "if found < score:",
        "if found > score:",
        FINDER + "test_no_single_change_of_what_is_found_is_better",
    ),
    Fault(
        "sketch.block",
        "the nearest degrees are looked for on the ranks of the whole job",
        "mm/search/sketch.py",
        "space.sink_degrees(sink.size)",
        "space.sink_degrees(space.world)",
        FINDER + "test_each_candidate_is_its_own_sketch",
    ),
    Fault(
        "sketch.pipeline",
        "micro-batches that are not in the space become the fewest",
        "mm/search/sketch.py",
        "m = max((n for n in numbers",
        "m = min((n for n in numbers",
        FINDER + "test_what_is_not_in_the_space_becomes_the_nearest_that_is",
    ),
    Fault(
        "first.near",
        "of several layouts only the first has to be near enough",
        "mm/search/plan.py",
        "best[-1][0] <= (1 + share) * least",
        "best[0][0] <= (1 + share) * least",
        "tests/mm/search/test_first.py::test_a_search_ends_where_nothing_left_is_faster_by_a_share",
    ),
    Fault(
        "polish.room",
        "polishing forgets how much memory a goal may have",
        "mm/search/goals.py",
        "found.why is None and found.bytes <= self.limit and",
        "found.why is None and",
        POLISH + "test_choices_beside_the_space_are_adopted_where_they_fit",
    ),
    Fault(
        "polish.time",
        "polishing goes on when the time is up",
        "mm/search/polish.py",
        "if time.process_time() > until:",
        "if False:",
        POLISH + "test_nothing_is_predicted_once_the_time_is_up_unless_it_is_to_settle",
    ),
    Fault(
        "polish.unsearched",
        "choices beside the searched space are not tried",
        "mm/search/neighbours.py",
        "    yield from unsearched(space, of)\n",
        "",
        POLISH + "test_choices_beside_the_space_are_adopted_where_they_fit",
    ),
    Fault(
        "polish.proof",
        "what polishing has replaced does not count as left out",
        "mm/search/plan.py",
        "min([self.least, *gone])",
        "self.least",
        "tests/mm/search/test_written.py::test_what_gave_way_counts_as_left_out",
    ),
    Fault(
        "written.within",
        "a search that ended early is said to have proved what was asked for",
        "mm/search/written.py",
        "if gap <= plan.within:",
        "if plan.within:",
        "tests/mm/search/test_written.py::test_what_is_proved_is_said",
    ),
    Fault(
        "fits.room",
        "what does not fit either is proposed",
        "mm/search/fits.py",
        "if shortfall(found, predictor.hardware) is not None:",
        "if False:",
        "tests/mm/commands/test_plan_layout.py::test_a_stage_is_planned_and_what_would_fit_is_said",
    ),
)
