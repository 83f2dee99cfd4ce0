"""Faults of partly frozen encoders, pictures in tiles, video and resamplers."""

from __future__ import annotations

from tests.mutations.fault import Fault

RESOLUTION = (
    Fault(
        "frozen.stage",
        "a later pipeline stage counts the frozen layers from its own first one",
        "encoders/module.py",
        "inside[: max(0, layers - first)]",
        "inside[:layers]",
        "tests/encoders/test_frozen_layers.py::test_a_stage_of_a_pipeline_has_its_own_of_the_first_layers",
    ),
    Fault(
        "tiles.order",
        "tiles are counted column by column",
        "encoders/vision/pictures.py",
        "row, column = divmod(number, grid.across)",
        "column, row = divmod(number, grid.down)",
        "tests/encoders/test_tiles.py::test_pixels_of_tiles_are_the_processors",
    ),
    Fault(
        "tiles.grid",
        "of grids of equal aspect the first is taken",
        "encoders/vision/sizes.py",
        "or (off == nearest and enough)",
        "or (off == nearest and False)",
        "tests/encoders/test_tiles.py::test_the_grid_of_tiles_is_internvls",
    ),
    Fault(
        "pieces.cache",
        "all pieces of an item have the rows of the first",
        "mm/plan/inputs.py",
        'part.meta.get("piece", -1)',
        "-1",
        "tests/mm/plan/test_pieces.py::test_pieces_of_other_sizes_have_their_own_rows",
    ),
    Fault(
        "pieces.tag",
        "text between tiles is taken from the sample",
        "mm/ranks/batch.py",
        "texts.pop(0) if seg.ids is None else seg.ids",
        "texts[0] if seg.ids is None else seg.ids",
        "tests/mm/plan/test_pieces.py::test_rows_of_tiles_enter_between_tags",
    ),
    Fault(
        "video.order",
        "frames are taken in the order of the tar",
        "encoders/vision/video.py",
        "for _, data in sorted(frames)",
        "for _, data in frames",
        "tests/encoders/test_video.py::test_pixels_are_those_of_the_processors",
    ),
    Fault(
        "video.tubelet",
        "every tubelet is the first",
        "encoders/vision/video.py",
        'meta["group"] * cfg.frames, cfg.frames',
        "0 * cfg.frames, cfg.frames",
        "tests/encoders/test_video.py::test_tubelets_one_by_one_are_the_video",
    ),
    Fault(
        "video.seconds",
        "the time of a tubelet is that of its first frame",
        "encoders/vision/video.py",
        "(first / rate + last / rate) / 2",
        "first / rate",
        "tests/encoders/test_video.py::test_the_frames_that_are_taken_are_qwens",
    ),
    Fault(
        "resampler.keys",
        "queries do not attend to queries",
        "encoders/resampler.py",
        "[a + b for a, b in zip(seen, asked, strict=True)]",
        "seen",
        "tests/encoders/test_resampler.py::test_it_is_idefics2s",
    ),
    Fault(
        "resampler.rows",
        "an item without features has rows",
        "encoders/projector.py",
        'if self.kind == "resampler" and given else',
        'if self.kind == "resampler" else',
        "tests/encoders/test_resampler.py::test_it_is_idefics2s",
    ),
    Fault(
        "pixtral.rotation",
        "rows and columns have the same frequencies",
        "encoders/vision/position.py",
        "columns * both[1::2]",
        "columns * both[0::2]",
        "tests/encoders/test_published.py::test_states_and_gradients_equal_transformers[pixtral]",
    ),
    Fault(
        "sound.clip",
        "every clip is the first",
        "encoders/audio/sound.py",
        'first = meta.get("clip", 0) * int(',
        "first = 0 * int(",
        "tests/encoders/test_clips.py::test_clips_one_after_another_are_the_recording",
    ),
    Fault(
        "frozen.flops",
        "frozen layers cost a backward",
        "mm/plan/trained.py",
        "frozen = enc.freeze_layers if",
        "frozen = 0 if",
        "tests/encoders/test_frozen_layers.py"
        "::test_a_pipeline_asks_for_no_gradient_below_the_lowest_trained_layer",
    ),
)
