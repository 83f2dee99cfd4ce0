"""Positions of three axes (M-RoPE): numbers, rotation and answers are those of transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm import load_hf
from llm.decode import Prompt, generate
from llm.model import LLMBatch
from llm.moe import ForwardContext
from llm.rotary import RopeAxes, axis_of_pairs
from parallel.sequence.grid import RowGrid, grid_positions
from parallel.sequence.packed import Packing
from parallel.tensor_parallel.loss import logits
from tests.llm.qwen_vl import MERGE, NAMES, VIDEO, build, inputs, prompt, runs, text_folder
from tests.llm.test_decode import forced
from tests.llm.widened import Widened
from tests.slow import on_demand

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_those_of_transformers(name: str) -> None:
    model = build(name).model

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10_000), st.integers(0, 6))
    def check(seed: int, pieces: int) -> None:
        ids, kinds, sizes = prompt(seed, pieces)
        grid = torch.tensor([[1, *size] for size in sizes]) if sizes else None
        expected, shift = model.get_rope_index(ids, kinds, image_grid_thw=grid)
        found = grid_positions(runs(ids[0].tolist(), sizes))
        assert np.array_equal(found, expected[:, 0].numpy())
        assert found.max() + 1 - ids.shape[1] == shift.item()

    check()


def test_frames_of_a_video_are_seconds_apart() -> None:
    model = build("qwen2_5_vl").model

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.3, 0.5, 1.0, 2.04]))
    def check(frames: int, down: int, across: int, seconds: float) -> None:
        grid = RowGrid(frames, down, across, step=seconds * model.config.vision_config.tokens_per_second)
        kinds = torch.tensor([[0, 0, *[2] * grid.rows, 0]])
        expected, _ = model.get_rope_index(
            torch.where(kinds == 2, VIDEO, 3),
            kinds,
            video_grid_thw=torch.tensor([[frames, down * MERGE, across * MERGE]]),
            second_per_grid_ts=torch.tensor([seconds]),
        )
        assert np.array_equal(grid_positions([2, grid, 1]), expected[:, 0].numpy())

    check()


def text_of(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Any]:
    """Ids, rows, and levels of a prompt as transformers' tower gives them."""
    if "pixel_values" not in given:
        return given["input_ids"][0], None, []
    out = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
    levels = getattr(out, "deepstack_features", None) or []
    return given["input_ids"][0], torch.cat(out.pooler_output), [torch.cat(x) for x in levels]


@pytest.mark.parametrize("name", on_demand(NAMES, ["qwen2_5_vl"]))
def test_logits_and_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The language model alone, its rows given: packed documents, and pictures before, between and after."""
    for seed in range(3):
        theirs = build(name, seed)
        model = load_hf(text_folder(theirs, tmp_path / f"{seed}"), dtype=torch.float64).model.eval()
        levels = len(theirs.config.vision_config.to_dict().get("deepstack_visual_indexes", []))
        model.cfg = replace(model.cfg, level_layers=tuple(range(1, 2 * levels, 2)))
        prompts, expected, answers, steps = [], [], [], []
        for k in range(3):
            given = inputs(10 * seed + k)
            with Widened(), torch.no_grad():
                ids, rows, more = text_of(theirs, given)
                expected.append(theirs(**given).logits[0])
                said = theirs.generate(**given, **GREEDY, max_new_tokens=6)
            answers.append(said.sequences[0, len(ids) :])
            steps.append(torch.cat(said.logits))
            places = torch.from_numpy(grid_positions(runs(ids.tolist(), prompt(10 * seed + k)[2])))
            if rows is None:
                prompts.append(Prompt(ids, places=places))
                continue
            rows = torch.stack([rows, *more], 1) if more else rows
            at = torch.nonzero(given["mm_token_type_ids"][0]).squeeze(1)
            prompts.append(Prompt(ids, {"vision": rows}, {"vision": at}, places))
        with torch.no_grad():
            for one, theirs_said in zip(prompts, expected, strict=True):
                packing = Packing((len(one.ids),), torch.device("cpu"), places=one.places)
                batch = LLMBatch(one.ids, one.ids, packing, len(one.ids), one.positions)
                states = model.states(batch, one.rows, ForwardContext(packing, len(one.ids)))
                said = logits(states, model.head_weight())
                torch.testing.assert_close(said, theirs_said, rtol=1e-10, atol=1e-10)
        assert generate(model, prompts, 6) == [a.tolist() for a in answers]
        found = forced(model, prompts, torch.stack(answers, 1))
        torch.testing.assert_close(found, torch.stack(steps, 1), rtol=1e-9, atol=1e-9)


def test_pairs_take_turns_or_follow_each_other() -> None:
    assert axis_of_pairs(RopeAxes((2, 1, 1))).tolist() == [0, 0, 1, 2]
    assert axis_of_pairs(RopeAxes((3, 2, 1), interleaved=True)).tolist() == [0, 1, 2, 0, 1, 0]
    # Sections that do not fit the turns: as transformers' slices have it.
    assert axis_of_pairs(RopeAxes((0, 1, 3), interleaved=True)).tolist() == [0, 1, 2, 0]
    r = random.Random(0)
    for _ in range(20):
        cut = sorted(r.choices(range(9), k=2))
        axes = RopeAxes((cut[0], cut[1] - cut[0], 8 - cut[1]), interleaved=True)
        assert len(axis_of_pairs(axes)) == 8
