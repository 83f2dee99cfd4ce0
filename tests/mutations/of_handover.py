"""Faults of weights that pass from one layout to another in memory."""

from __future__ import annotations

from tests.mutations.fault import Fault

AUDIO = "tests/encoders/test_audio_layouts.py"

HANDOVER = (
    Fault(
        "handover.cut",
        "the second part of a long row range goes where the first went",
        "parallel/checkpoint/handover.py",
        "dest_offsets=_with(item.dest_offsets, item.dest_offsets[0] + first),",
        "dest_offsets=item.dest_offsets,",
        "tests/parallel/checkpoint/test_handover.py::test_any_layout_enters_any_other",
    ),
    Fault(
        "handover.own",
        "what a rank holds is fetched from another one",
        "parallel/checkpoint/handover.py",
        "r // self._node_size != node, (r - self._rank) % self._world)",
        "r // self._node_size != node, (self._rank - r - 1) % self._world)",
        "tests/parallel/checkpoint/test_handover.py::test_any_layout_enters_any_other",
    ),
    Fault(
        "share.tail",
        "the odd state of a clip is where its first pair is",
        "encoders/share.py",
        "ended = bisect_right(first, row) - 1",
        "ended = bisect_left(first, row)",
        f"{AUDIO}::test_a_split_encoder_is_the_whole_encoder[(2, 2, True)-audioflamingo3]",
    ),
)
