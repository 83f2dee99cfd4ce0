"""Faults in what is said of a comparison of layouts."""

from __future__ import annotations

from tests.mutations.fault import Fault

TEST = "tests/mm/compare/test_verdict.py::test"
_HINDERED = (
    "tests/mm/compare/test_summary.py::test_what_hinders_the_telling_of_an_early_end_does_not_take_its_place"
)

COMPARE = (
    Fault(
        "compare.chain",
        "the longest chain of a step stays on the rank that ended last",
        "mm/compare/chain.py",
        "if last is not None and last.sent > free:",
        "if last is not None and last.sent > free + 1e9:",
        f"{TEST}_what_bounds_a_layout",
    ),
    Fault(
        "compare.queued",
        "waiting for a core counts as exchanging",
        "mm/compare/chain.py",
        "return computing, min(1.0 - computing, (a.queued or 0.0) / worked)",
        "return computing, 0.0",
        f"{TEST}_the_update_and_the_cores_that_ranks_share_are_named",
    ),
    Fault(
        "compare.uneven",
        "one rank that computes while the others wait passes for work that all share",
        "mm/compare/bound.py",
        "if mean >= EVEN * seconds:",
        "if mean >= 0 * EVEN * seconds:",
        f"{TEST}_what_bounds_a_layout",
    ),
    Fault(
        "compare.noise",
        "a difference within noise is called one",
        "mm/compare/verdict.py",
        'return verdict(speedup_interval(run.rounds, best.rounds)) == "slower"',
        "return run.step_s.median > best.step_s.median",
        f"{TEST}_the_fastest_is_named_with_how_much_and_whether_noise_could_be_it",
    ),
    Fault(
        "compare.rounds",
        "steps of one round count as independent",
        "mm/compare/summary.py",
        "    if len(logs) < FEWEST:\n        return None",
        "    if len(logs) < FEWEST:\n        logs = [x for r in ratios for x in r]",
        "tests/mm/compare/test_summary.py::test_equal_layouts_are_seldom_called_different",
    ),
    Fault(
        "compare.turns",
        "a layout follows the same one in every round",
        "mm/compare/rounds.py",
        "return runs[::-1] if number % 2 else runs",
        "return runs",
        "tests/mm/compare/test_summary.py::test_layouts_change_places_from_round_to_round",
    ),
    Fault(
        "compare.failed",
        "a layout that failed is among those that can be told of",
        "mm/compare/rounds.py",
        "if run.done and run.variant.name != failed]",
        "if run.done]",
        "tests/mm/compare/test_summary.py::test_what_was_measured_before_an_early_end",
    ),
    Fault(
        "compare.half",
        "a round that was not ended counts",
        "mm/compare/rounds.py",
        "rounds = min((run.done for run in kept), default=0)",
        "rounds = max((run.done for run in kept), default=0)",
        "tests/mm/compare/test_summary.py::test_what_was_measured_before_an_early_end",
    ),
    Fault(
        "compare.gone",
        "a store that is gone takes the place of why a comparison has failed",
        "mm/compare/early.py",
        "except Exception:  # the store",
        "except ValueError:  # the store",
        _HINDERED,
    ),
    Fault(
        "compare.unwritten",
        "a page that cannot be written takes the place of why a comparison has failed",
        "mm/compare/rounds.py",
        "    except Exception as error:\n        print(",
        "    except ValueError as error:\n        print(",
        _HINDERED,
    ),
    Fault(
        "compare.asked",
        "a request that reached one rank alone does not end a comparison",
        "mm/compare/rounds.py",
        "job.control.gather([float(stop.requested)]).any()",
        "job.control.gather([float(stop.requested)]).all()",
        "tests/mm/compare/test_measured.py::test_a_request_to_one_rank_ends_a_comparison_on_all",
    ),
    Fault(
        "compare.reason",
        "a rank that was ended by another's failure says that it was interrupted",
        "mm/compare/early.py",
        "if unknown and not rank.store.check([KEY]):",
        "if unknown:",
        "tests/mm/compare/test_summary.py::test_the_rank_that_knows_the_reason_names_it",
    ),
    Fault(
        "compare.files",
        "a layout file whose path has a = is taken for an override",
        "mm/commands/compare.py",
        'if "=" in x and not Path(x).is_file()]',
        'if "=" in x]',
        "tests/mm/test_cli.py::test_layouts_may_be_followed_by_overrides",
    ),
    Fault(
        "compare.together",
        "a layout that was measured already is proposed",
        "mm/compare/verdict.py",
        "if any(all(run.placed[m] == chosen[m].placed[m] for m in chosen) for run in measured):",
        "if all(run is best for run in chosen.values()):",
        f"{TEST}_each_module_as_it_is_best_is_proposed_where_no_layout_has_both",
    ),
)
