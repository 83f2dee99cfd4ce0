"""Faults in `parallel/schedule`."""

from __future__ import annotations

from tests.mutations.fault import Fault

GATHERS_AND_SUMS = (
    "tests/parallel/schedule/checker/test_streams.py"
    "::test_gathers_start_before_their_first_rank_needs_them_and_sums_once_the_last_has_its_gradients"
)
HALVES = "tests/parallel/schedule/executor/test_halves.py::test_two_halves_are_one_backward"

SCHEDULES = (
    Fault(
        "plan.replicas",
        "the plan knows nothing of sums over copies of shards",
        "parallel/schedule/plan.py",
        "replica=sums and summed",
        "replica=False",
        "tests/parallel/schedule/generators/test_make.py::test_copies_of_shards_are_summed_once_a_step",
    ),
    Fault(
        "schedule.warm-up",
        "1F1B runs one forward further ahead",
        "parallel/schedule/generators/orders.py",
        "min(2, v) * (p - r - 1)",
        "min(2, v) * (p - r)",
        "tests/parallel/schedule/checker/test_check.py::test_high_water_marks_are_those_of_the_literature",
    ),
    Fault(
        "checker.pair-waits",
        "a pair begins without the input of its backward",
        "parallel/schedule/checker/reader.py",
        "*(key for a in begun for key in self._transfers(p, a))",
        "*self._transfers(p, begun[0])",
        "tests/parallel/schedule/generators/test_pairs.py::test_a_pair_that_waits_for_itself_is_caught",
    ),
    Fault(
        "schedule.pair-warm-up",
        "a rank warms up for pairs as for 1F1B, and one forward more",
        "parallel/schedule/generators/orders.py",
        "2 * (p - r - 1) + (v - 1) * p + 1, paired=True",
        "min(2, v) * (p - r - 1) + (v - 1) * p + 1, paired=True",
        "tests/parallel/schedule/generators/test_pairs.py::test_pairs_cost_activations_and_no_bubble",
    ),
    Fault(
        "simulator.pair-link",
        "two exchanges of a pair use a rank's link at once",
        "parallel/schedule/simulator/costs.py",
        "there[turn] = link = max(now, link)",
        "there[turn] = now",
        "tests/parallel/schedule/generators/test_pairs.py"
        "::test_turns_take_no_less_than_either_resource_and_no_more_than_both",
    ),
    Fault(
        "schedule.zero-bubble",
        "weight gradients do not wait",
        "parallel/schedule/generators/orders.py",
        "if len(waiting) > r:",
        "if waiting:",
        "tests/parallel/schedule/simulator/test_simulate.py::test_bubble_of_zero_bubble",
    ),
    Fault(
        "schedule.unproved",
        "what a plan lacks is not reported",
        "parallel/schedule/checker/check.py",
        "for lacking in sorted(map(_describe, need - done)):",
        "for lacking in sorted(map(_describe, done - done)):",
        "tests/parallel/schedule/checker/test_check.py::test_a_dropped_or_doubled_action_is_caught",
    ),
    Fault(
        "schedule.transfers-free",
        "transfers take no time",
        "parallel/schedule/simulator/simulate.py",
        "start = max(start, ends[k] + delays[key[0]])",
        "start = max(start, ends[k])",
        "tests/parallel/schedule/simulator/test_simulate.py::test_transfers_are_paid_where_nothing_hides_them",
    ),
    Fault(
        "schedule.peak",
        "a backward frees nothing",
        "parallel/schedule/checker/memory.py",
        "total, held[module] = total - amount, held[module] - amount",
        "total, held[module] = total, held[module] - amount",
        "tests/parallel/schedule/checker/test_check.py::test_high_water_marks_are_those_of_the_literature",
    ),
    Fault(
        "schedule.halves-twice",
        "a weight that is used otherwise too waits all the same",
        "parallel/schedule/executor/halves.py",
        "while mixed := [p for p in products if p.leaves & others]:",
        "while mixed := [p for p in products if p.leaves & others and False]:",
        HALVES,
    ),
    Fault(
        "schedule.halves-order",
        "weight gradients of second factors are transposed",
        "parallel/schedule/executor/halves.py",
        "Kept(edges, factor.mT, grad) if second",
        "Kept(edges, grad.mT, factor) if second",
        HALVES,
    ),
    Fault(
        "plan.sums",
        "the plan knows nothing of sums before the last backward",
        "parallel/schedule/plan.py",
        '(last or self.sums == "backward")',
        "last",
        "tests/parallel/schedule/generators/test_make.py::test_parameters_are_gathered_once_a_step_on_request",
    ),
    Fault(
        "posting.turn",
        "transfers of one second are started in any order",
        "parallel/schedule/generators/posting.py",
        "return {n: (ends[n], turn) for turn, entry in enumerate(graph.order) for n in entry}",
        "return {n: (ends[n], -turn) for turn, entry in enumerate(graph.order) for n in entry}",
        "tests/parallel/schedule/checker/test_streams.py::test_things_that_take_no_time_keep_their_order",
    ),
    Fault(
        "posting.joined",
        "messages of peers with a rank in common have moments of their own",
        "parallel/schedule/generators/posting.py",
        "parent[root(n)] = root(other)",
        "pass",
        "tests/parallel/schedule/checker/test_streams.py::test_every_generated_plan_has_one_order_of_operations",
    ),
    Fault(
        "posting.gathers",
        "a gather starts when the last of its ranks needs it",
        "parallel/schedule/generators/posting.py",
        "min(found.get(message, moment), moment)",
        "max(found.get(message, moment), moment)",
        GATHERS_AND_SUMS,
    ),
    Fault(
        "posting.sums",
        "gradients are summed after all other work",
        "parallel/schedule/generators/posting.py",
        "before = reading.before[n] if a.kind is not Kind.GRAD_SYNC else final[a.module, a.stage]",
        "before = reading.before[n]",
        GATHERS_AND_SUMS,
    ),
    Fault(
        "reader.gathers",
        "no computation waits for a gather",
        "parallel/schedule/checker/reader.py",
        "for key in gathers.pop((b.module, b.stage), ())",
        "for key in ()",
        "tests/parallel/schedule/simulator/test_simulate.py"
        "::test_gathers_and_sums_are_paid_where_nothing_hides_them",
    ),
    Fault(
        "reader.sums",
        "the optimizer does not wait for sums",
        "parallel/schedule/checker/reader.py",
        "more = sums if a.kind is Kind.OPTIMIZER else []",
        "more: list[TransferKey] = []",
        "tests/parallel/schedule/simulator/test_simulate.py::test_the_optimizer_waits_for_sums",
    ),
    Fault(
        "simulate.sums",
        "a step ends before its sums are there",
        "parallel/schedule/simulator/simulate.py",
        "return max((*self.ends, *sums), default=0.0)",
        "return max(self.ends, default=0.0)",
        "tests/parallel/schedule/simulator/test_simulate.py"
        "::test_gathers_and_sums_are_paid_where_nothing_hides_them",
    ),
    Fault(
        "traffic.units",
        "gathers in a computation are hidden but for their first unit, however long they take",
        "parallel/schedule/simulator/costs.py",
        "max(moved / units, moved - self.seconds(a) * (1 - 1 / units))",
        "moved / units",
        "tests/parallel/schedule/simulator/test_simulate.py"
        "::test_gathers_in_each_computation_expose_their_first_unit",
    ),
    Fault(
        "memory.whole",
        "gathers start early whatever memory they take",
        "parallel/schedule/generators/make.py",
        "(took < least and _holds(found, options) <= most)",
        "took < least",
        "tests/parallel/schedule/generators/test_make.py"
        "::test_a_gather_starts_later_where_memory_does_not_allow_it",
    ),
    Fault(
        "streams.fifo",
        "a stream carries out any of its operations",
        "parallel/schedule/checker/streams.py",
        "            if len(queue) == 1:\n                self._lead(n)",
        "            self._lead(n)",
        "tests/parallel/schedule/checker/test_streams.py"
        "::test_both_directions_over_one_pair_hang_unless_their_calls_have_one_order[interleaved]",
    ),
    Fault(
        "streams.one",
        "collectives pass by transfers that were started before them",
        "parallel/schedule/checker/streams.py",
        'if self.one and n in self.reading.collectives and self.queues[_At(p, "")]:',
        "if False:",
        "tests/parallel/schedule/checker/test_streams.py"
        "::test_collectives_have_their_place_among_the_messages",
    ),
)
