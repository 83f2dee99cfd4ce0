"""Faults of positions of three axes, and of Qwen's vision-language models."""

from __future__ import annotations

from tests.mutations.fault import Fault

ANSWERS = "tests/llm/test_axes.py::test_logits_and_answers_are_those_of_transformers[qwen3_vl]"
ASKED = "tests/mm/checkpoint/test_qwen_vl.py::test_a_whole_folder_is_asked_as_transformers_asks_it"

QWEN = (
    Fault(
        "axes.advance",
        "text after a picture begins after as many positions as it has rows",
        "parallel/sequence/grid.py",
        "at += max(run.down, run.across)",
        "at += run.rows",
        "tests/llm/test_axes.py::test_positions_are_those_of_transformers",
    ),
    Fault(
        "axes.pairs",
        "pairs take turns beyond the sections of rows and columns",
        "llm/rotary.py",
        "out[axis : AXES * axes.sections[axis] : AXES] = axis",
        "out[axis::AXES] = axis",
        "tests/llm/test_axes.py::test_pairs_take_turns_or_follow_each_other",
    ),
    Fault(
        "axes.cp",
        "a rank of cp has the positions of the stream's first rows",
        "mm/ranks/positions.py",
        "places[:, packing.rows]",
        "places[:, : packing.total]",
        "tests/mm/jobs/test_qwen_vl.py::test_any_layout_learns_alike[qwen3_vl]",
    ),
    Fault(
        "axes.answer",
        "answers go on at their number in the document, not after the pictures",
        "llm/decode.py",
        "[n + shift for n, shift in zip(past, shifts, strict=True)]",
        "[n for n, shift in zip(past, shifts, strict=True)]",
        ANSWERS,
    ),
    Fault(
        "axes.seconds",
        "frames of a video are a second apart",
        "encoders/vision/model.py",
        "np.float32(step) * np.float32(step_seconds(cfg, meta))",
        "np.float32(step)",
        f"{ASKED}[qwen2_5_vl-shown]",
    ),
    Fault(
        "axes.tags",
        "texts between the frames of a prompt's video take no positions",
        "mm/inference/prompt.py",
        "runs.append(len(new))",
        "runs.append(0)",
        f"{ASKED}[qwen3_vl-shown]",
    ),
    Fault(
        "qwen.levels",
        "levels enter after attention, not after the block",
        "mm/containers/qwen.py",
        "2 * k + 1 for k in range(levels)",
        "2 * k for k in range(levels)",
        f"{ASKED}[qwen3_vl-asked]",
    ),
    Fault(
        "qwen.interleaved",
        "files that do not say that pairs take turns have them one after another",
        "llm/hf/within.py",
        "    if within.interleaved:",
        "    if within.interleaved and INTERLEAVED in rope:",
        "tests/mm/checkpoint/test_qwen_vl.py::test_what_files_leave_out_is_as_transformers_has_it",
    ),
)
