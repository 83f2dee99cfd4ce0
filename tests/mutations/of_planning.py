"""Faults of predictions."""

from __future__ import annotations

from tests.mutations.fault import Fault

SHARED = "tests/mm/search/test_predictor.py::test_what_candidates_share_changes_no_prediction"
ENGINE = "tests/mm/predict/test_engine.py::"

PLANNING = (
    Fault(
        "engine.kept",
        "activations of published runs are split over tp without sequence parallelism too",
        "mm/predict/engine.py",
        "return part.states * layers * (engine.held.whole / part.whole + engine.held.split / part.tp)",
        "return part.states * layers * (engine.held.whole + engine.held.split) / part.tp",
        ENGINE + "test_a_rank_computes_and_holds_what_closed_forms_say",
    ),
    Fault(
        "engine.shared",
        "masters and moments of published runs are shared by dp alone, not by cp",
        "mm/predict/engine.py",
        "shards = max(1, layout.dp * layout.cp)",
        "shards = max(1, layout.dp)",
        ENGINE + "test_states_are_six_bytes_a_parameter_and_twelve_shared",
    ),
    Fault(
        "made_up.markers",
        "made-up samples are longer than asked for by their markers",
        "mm/plan/made_up.py",
        "left = (given.length or inputs.context) - MARKERS - rows",
        "left = (given.length or inputs.context) - rows",
        "tests/mm/plan/test_made_up.py::test_made_up_samples_hold_what_is_asked_for_of_every_encoder",
    ),
    Fault(
        "shared.weights",
        "candidates of other experts' degrees share weights",
        "mm/plan/blueprint.py",
        "x.tp, x.ep, x.etp",
        "x.tp, x.etp",
        SHARED,
    ),
    Fault(
        "shared.plan",
        "candidates of other context-parallel degrees share a step's plan",
        "mm/search/predictor.py",
        "_replace(vpp=1, ep=1, etp=1)",
        "_replace(cp=1, vpp=1, ep=1, etp=1)",
        SHARED,
    ),
    Fault(
        "plan.outputs",
        "a folder that is not there is found out after the work",
        "mm/commands/command.py",
        "if not folder.is_dir():",
        "if False:",
        "tests/mm/search/test_plan.py::test_wrong_arguments_are_refused_in_words",
    ),
    Fault(
        "plan.hardware",
        "unknown hardware is refused once torch is imported",
        "mm/commands/plan.py",
        "    hardware = load_hardware(args.hardware)\n",
        "    import mm.search.predictor\n\n    hardware = load_hardware(args.hardware)\n",
        "tests/mm/search/test_plan.py::test_wrong_arguments_are_refused_in_words",
    ),
    Fault(
        "compare.stage",
        "a compared stage is trained under its own layout",
        "mm/commands/compare.py",
        'if key not in ("layout", "schedule")',
        'if key != "schedule"',
        "tests/mm/commands/test_stage.py::test_the_command_of_a_compared_stage_trains_it_under_its_layout",
    ),
    Fault(
        "dry_run.rows",
        "a dry run has a row for each of a thousand ranks",
        "mm/commands/dry_run.py",
        "rank if blueprint.world <= ROWS else places",
        "rank",
        "tests/mm/commands/test_dry_run.py::test_few_ranks_have_a_row_each_and_many_share_rows",
    ),
    Fault(
        "labels.cover",
        "labels of points cover each other",
        "mm/pages/labels.py",
        "and not any(b.meets(t) for t in taken)",
        "",
        "tests/mm/pages/test_labels.py::test_labels_of_thirty_points_cover_nothing",
    ),
)
