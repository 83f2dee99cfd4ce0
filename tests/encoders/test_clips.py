"""Recordings that are longer than an encoder hears at once: cut, which is said, or clip by clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import encoders
from encoders.audio.sound import Sound, read_clip, samples_of
from mm.config.schema import from_mapping
from mm.data.sample import Index, Part, Sample, Segment
from mm.data.tokenizer import Tokenizer
from mm.plan.blueprint import draw_up
from mm.plan.pieces import omissions, with_pieces
from tests.encoders.helpers import wav
from tests.mm.harness import CONFIGS, small

CLIPS = Sound(rate=800, seconds=0.5, long="clips")


def pieces(name: str, sound: Sound, meta: dict[str, int]) -> list[Any]:
    cls: Any = encoders.resolve(name)
    return list(cls.pieces(cls.Config(sound=sound), meta))


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 3000), rate=st.sampled_from([400, 800, 1000, 8000]))
def test_clips_one_after_another_are_the_recording(samples: int, rate: int) -> None:
    payload, meta = wav(samples, rate), {"samples": samples, "rate": rate}
    whole = Sound(rate=800, seconds=1000.0)
    clips = pieces("whisper", CLIPS, meta)
    several = [{**meta, "clip": k} for k in range(len(clips))]
    assert clips == ([meta] if samples * 800 <= 400 * rate else several)
    found = [read_clip(CLIPS, payload, clip) for clip in clips]
    assert [len(x) for x in found] == [samples_of(CLIPS, clip) for clip in clips]
    assert all(len(x) == 400 for x in found[:-1])
    assert torch.equal(torch.cat(found), read_clip(whole, payload, meta))
    short = Sound(rate=800, seconds=0.5)
    assert pieces("whisper", short, meta) == [meta]
    assert torch.equal(read_clip(short, payload, meta), found[0])


def test_a_rest_that_is_too_short_for_a_row_is_left_out() -> None:
    sound = Sound(rate=800, seconds=1.0, long="clips")
    for rest, clips in ((9, 2), (400, 3)):
        assert len(pieces("wav2vec2", sound, {"samples": 1600 + rest, "rate": 800})) == clips
    with pytest.raises(ValueError, match="zero samples"):
        pieces("parakeet", sound, {"samples": 0, "rate": 800})


def test_a_run_says_what_is_cut() -> None:
    def sample(k: int, samples: int) -> Sample:
        part = Part("a.tar", "a.wav", 512 * k, 9, f"{k}", {"samples": samples, "rate": 16000})
        return Sample(k, f"{k}", "a.tar", (Segment("audio", 0, part, True, None),), part)

    index = Index(tuple(sample(k, n) for k, n in enumerate((16000, 480_200, 1_000_000))), ())
    line = "2 of 3 items of audio: sound after 30 s is left out; options {sound: {long: clips}} keep it"
    for long, rows, said in (("cut", [13, 375, 375], [line]), ("clips", [13, 375, 375, 375, 32], [])):
        raw = small()
        raw["model"]["audio"]["encoder"] = "parakeet"
        sizes = {"width": 24, "heads": 4, "layers": 1, "ffn": 8}
        raw["model"]["audio"]["options"] = {**sizes, "sound": {"long": long}}
        inputs = draw_up(from_mapping(raw, CONFIGS), 1).inputs
        found = with_pieces(index, inputs, Tokenizer())
        parts = [p for s in found.samples for p in s.items("audio")]
        assert [inputs.rows("audio", p) for p in parts] == rows
        assert omissions(found, inputs.encoders) == said
