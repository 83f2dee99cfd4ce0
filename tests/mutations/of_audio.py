"""Faults in audio encoders, and in encoders whose classes are others'."""

from __future__ import annotations

from tests.mutations.fault import Fault

EQUAL = "tests/encoders/test_audio.py::test_features_and_gradients_are_those_of_transformers"
SPLIT = "tests/encoders/test_audio_layouts.py::test_a_split_encoder_is_the_whole_encoder[(2, 2, True)-{}]"
INPUTS = "tests/encoders/test_audio.py::test_inputs_are_those_of_the_feature_extractor"
CLASSES = "tests/encoders/test_adapter.py::test_a_folder_gives_what_its_own_class_gives"

AUDIO = (
    Fault(
        "whisper.cut",
        "a stretch of a clip begins with zeros though it does not begin the clip",
        "encoders/audio/whisper.py",
        "(1 if start == 0 else 0, 0))",
        "(1 if start == 0 else 0, 0)) * (start == 0)",
        SPLIT.format("whisper"),
    ),
    Fault(
        "wav2vec2.norm",
        "the norm over time is over a stretch of the clip",
        "encoders/audio/wav2vec2.py",
        "return 0, inputs  # the norm is over the whole clip",
        "return 0, max(self.fewest, inputs - 1)  # the norm is over the whole clip",
        EQUAL,
    ),
    Fault(
        "wav2vec2.near",
        "positions of a stretch see no rows before it",
        "encoders/audio/wav2vec2.py",
        "return max(0, start - before), min",
        "return start, min",
        SPLIT.format("wav2vec2"),
    ),
    Fault(
        "parakeet.distance",
        "distances are those of the mirror",
        "encoders/audio/relative.py",
        "self.position[b.queries][:, :, None] - torch.arange(keys, device=q.device)",
        "torch.arange(keys, device=q.device) - self.position[b.queries][:, :, None]",
        EQUAL,
    ),
    Fault(
        "parakeet.statistics",
        "each tp rank has the first channels' statistics",
        "encoders/audio/parakeet.py",
        "own = slice(tp.rank * n, (tp.rank + 1) * n)",
        "own = slice(0, n)",
        SPLIT.format("parakeet"),
    ),
    Fault(
        "audio.emphasis",
        "the first sample is emphasised by itself",
        "encoders/audio/sound.py",
        "shifted = F.pad(samples, (1, 0))[:-1]",
        "shifted = samples.roll(1)",
        INPUTS,
    ),
    Fault(
        "foreign.together",
        "items run as one batch though the class joins them",
        "encoders/foreign.py",
        "one.shape[0] == shape[0] and two.shape == (2 * shape[0], *one.shape[1:])",
        "one.shape[0] == shape[0]",
        CLASSES,
    ),
    Fault(
        "foreign.others",
        "items of other sizes have the first one's masks",
        "encoders/foreign.py",
        "return self.shape, _by_value(self.others)",
        "return (self.shape,)",
        "tests/encoders/test_adapter.py::test_items_with_other_masks_run_apart",
    ),
    Fault(
        "foreign.strict",
        "missing tensors are not looked at",
        "encoders/foreign.py",
        '(("missing_keys", "missing"), ("unexpected_keys", "unknown"))',
        '(("unexpected_keys", "unknown"),)',
        "tests/encoders/test_adapter.py::test_tensors_are_read_strictly",
    ),
)
