"""Faults of the search of layouts."""

from __future__ import annotations

from tests.mutations.fault import Fault

RAGGED = "tests/mm/search/test_ragged.py::"
FINDER = "tests/mm/search/test_finder.py::"

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
        "bound.frozen",
        "a model of which nothing is trained has a backward in its bounds",
        "mm/search/costs.py",
        "below=module == SINK and adapters is None and learns,",
        "below=module == SINK and adapters is None,",
        RAGGED + "test_what_is_not_trained_has_no_backward_in_a_bound_either",
    ),
    Fault(
        "space.recompute",
        "parts that no layer has are computed again, so all such candidates are refused",
        "mm/search/limits.py",
        'selected = tuple(sorted(recomputable(llm) - {"full"}))',
        'selected = ("attention_core", "mlp", "moe_act", "norm", "scan")',
        "tests/mm/search/test_plan.py::test_what_may_be_computed_again_is_something_that_the_model_has",
    ),
    Fault(
        "plan.known",
        "where a bound was too high, the best is not the best that was predicted",
        "mm/search/plan.py",
        "found[goal.name] = tuple(self.judged[leaf] for _, leaf in best)",
        "found[goal.name] = found[goal.name] or tuple(self.judged[leaf] for _, leaf in best)",
        "tests/mm/search/test_plan.py::test_the_best_that_was_found_is_the_best_where_a_bound_was_too_high_too",
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
)
