"""Whole folders of Qwen's vision-language models: read, asked, written, as transformers has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mm
from encoders.hf import open_folder
from encoders.vision.video import step_seconds, tubelets, video_size
from llm.decode import generate
from llm.hf.config import read_config
from llm.model import LLMBatch
from llm.moe import ForwardContext
from llm.rotary import RopeAxes
from mm.checkpoint.whole import read_whole
from mm.cli import main
from mm.containers.registry import fitting
from mm.data.probes import metadata
from mm.inference.prompt import read_prompt
from mm.inference.whole import WholeModel
from mm.plan.whole import whole_of
from parallel import checkpoint as store
from parallel.sequence.packed import Packing
from parallel.tensor_parallel.loss import logits
from tests.encoders.helpers import png
from tests.encoders.test_video import video
from tests.llm.folders import differing, read_all
from tests.llm.qwen_vl import CLASSES, NAMES, build, inputs, options
from tests.llm.widened import Widened
from tests.mm.data.tokenizers_made import CHATML, byte_bpe, write_tokenizer
from tests.slow import on_demand

IDS = {"vocab": 512, "image": 5}
VIDEO = 6
PICTURES = {"min_pixels": 64, "max_pixels": 400, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}


def saved(name: str, folder: Path, seed: int, dtype: torch.dtype) -> Any:
    """A model of transformers in its published format, with a tokenizer and a processor."""
    theirs = build(name, seed, dtype, **IDS)
    theirs.config.video_token_id = VIDEO
    theirs.save_pretrained(folder)
    write_tokenizer(folder, byte_bpe(), template=CHATML)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    size = {"size": {"shortest_edge": 64, "longest_edge": 2000}, "temporal_patch_size": 2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**PICTURES, **size, "fps": 2.0}))
    return theirs


def asked(model: WholeModel) -> tuple[Any, dict[str, Tensor]]:
    """A prompt of texts and two pictures, and the same for transformers."""
    payloads = {"a.png": png(16, 24, 1, "RGB"), "b.png": png(24, 8, 2, "RGB")}
    segments = [{"text": "here"}, {"vision": "a.png"}, {"text": " and "}, {"vision": "b.png"}, {"text": "?"}]
    prompt = read_prompt(model, {"segments": segments}, payloads)
    use = model.uses["vision"]
    metas = [{"height": 16, "width": 24, "channels": 3}, {"height": 24, "width": 8, "channels": 3}]
    values = [use.cls.prepare(use.cfg, p, m) for p, m in zip(payloads.values(), metas, strict=True)]
    grids = [use.cls.grid(use.cfg, m) for m in metas]
    given = {
        "input_ids": prompt.ids[None],
        "attention_mask": torch.ones_like(prompt.ids)[None],
        "mm_token_type_ids": (prompt.ids == IDS["image"]).int()[None],
        "pixel_values": torch.cat(values).double(),
        "image_grid_thw": torch.tensor([[g.frames, g.down, g.across] for g in grids]),
    }
    return prompt, given


def shown(model: WholeModel) -> tuple[Any, dict[str, Tensor]]:
    """A prompt with a video, and the same for transformers."""
    payload = video(9, (24, 16), "3.0")
    prompt = read_prompt(
        model, {"segments": [{"text": "see"}, {"vision": "a.tar"}, {"text": " end"}]}, {"a.tar": payload}
    )
    use = model.uses["vision"]
    meta = metadata("tar", payload)
    values = [
        use.cls.prepare(use.cfg, payload, p) for p in use.cls.pieces(use.cfg, meta) if not isinstance(p, str)
    ]
    down, across = (n // use.cfg.patch for n in video_size(use.cfg, meta))
    given = {
        "input_ids": prompt.ids[None],
        "attention_mask": torch.ones_like(prompt.ids)[None],
        "mm_token_type_ids": 2 * (prompt.ids == VIDEO).int()[None],
        "pixel_values_videos": torch.cat(values).double(),
        "video_grid_thw": torch.tensor([[tubelets(use.cfg, meta), down, across]]),
    }
    if use.cfg.tokens_per_second:
        given["second_per_grid_ts"] = torch.tensor([step_seconds(use.cfg, meta)])
    return prompt, given


@pytest.mark.parametrize("ask", on_demand([asked, shown], [shown]))
@pytest.mark.parametrize("name", on_demand(NAMES, ["qwen2_5_vl"]))
def test_a_whole_folder_is_asked_as_transformers_asks_it(name: str, ask: Any, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "m", 1, torch.float64)
    model = mm.load(tmp_path / "m")
    assert model.dtype == torch.float64
    prompt, given = ask(model)
    placeholder = VIDEO if ask is shown else IDS["image"]
    assert (prompt.ids == placeholder).sum() == len(prompt.positions["vision"]) > 0
    with torch.no_grad():
        packing = Packing((len(prompt.ids),), model.device, prompt.places)
        batch = LLMBatch(prompt.ids, prompt.ids, packing, len(prompt.ids), prompt.positions)
        found = logits(
            model.llm.states(batch, prompt.rows, ForwardContext(packing, len(prompt.ids))),
            model.llm.head_weight(),
        )
        with Widened():
            expected = theirs(**given).logits[0]
            said = theirs.generate(**given, do_sample=False, max_new_tokens=12)[0, len(prompt.ids) :]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert generate(model.llm, [prompt], 12) == [said.tolist()]


@pytest.mark.parametrize(
    ("name", "seed"),
    on_demand(
        [(n, s) for n in NAMES for s in (1, 2, 3)],
        [*((n, s) for n in NAMES for s in (2, 3)), ("qwen3_vl", 1)],
        several=True,
    ),
)
def test_a_whole_folder_is_read_and_written(
    name: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes, and transformers loads what was written to the same logits."""
    saved(name, tmp_path / "m", seed, torch.float32)
    assert main(["checkpoint", "import", str(tmp_path / "m"), str(tmp_path / "in")]) == 0
    path = store.published(tmp_path / "in")[-1]
    assert main(["checkpoint", "export", str(path), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert not differing(read_all(tmp_path / "out"), read_all(tmp_path / "m"))
    said = []
    for way in ("m", "out"):
        model, found = CLASSES[name][1].from_pretrained(
            tmp_path / way, attn_implementation="eager", output_loading_info=True
        )
        assert not found["missing_keys"] and not found["unexpected_keys"], found
        with torch.no_grad():
            given = inputs(seed, dtype=torch.float32)
            ids, kinds = given["input_ids"], given["mm_token_type_ids"].bool()
            given["input_ids"] = torch.where(kinds, IDS["image"], ids.where(ids != IDS["image"], 0))
            said.append(model(**given).logits)
    assert torch.equal(*said)
    assert open_folder(tmp_path / "out").cfg == open_folder(tmp_path / "m").cfg
    here, there = (json.loads((tmp_path / way / "config.json").read_text()) for way in ("out", "m"))
    assert not {
        (part, key)
        for part in ("text_config", "vision_config")
        for key, value in there[part].items()
        if here[part].get(key, value) != value and key not in ("initializer_range", "dtype")
    }


def test_older_files_say_the_same(tmp_path: Path) -> None:
    """Published ones of Qwen2.5-VL have no section of the language model, and another name of the axes."""
    config = CLASSES["qwen2_5_vl"][0](**options("qwen2_5_vl", 2)).to_dict()
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text = {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    older = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": older}
    assert "text_config" not in flat
    new = {**config, "text_config": {**text, "rope_parameters": rope, "model_type": "qwen2_5_vl_text"}}
    assert read_config(flat) == read_config(new)
    assert read_config(flat).rope_axes == RopeAxes(tuple(rope["mrope_section"]))


def test_what_files_leave_out_is_as_transformers_has_it() -> None:
    for name, (kind, _) in CLASSES.items():
        said = kind(text_config={}).to_dict()
        ours = read_config({"model_type": name, "text_config": {"model_type": f"{name}_text"}})
        assert ours == replace(read_config(said), source=ours.source), name
        assert ours.rope_axes is not None and ours.rope_axes.interleaved == (name == "qwen3_vl")


def test_a_model_of_another_container_is_refused_by_name(tmp_path: Path) -> None:
    saved("qwen3_vl", tmp_path / "m", 1, torch.float32)
    blueprint, _ = read_whole(tmp_path / "m")
    whole = whole_of(blueprint)
    found, wrong = fitting(whole)
    assert found is not None and found.name == "qwen3_vl"
    assert "model.vision.encoder is Qwen3VL; needed: qwen2_5_vl" in wrong["Qwen2.5-VL"]
    for change, words in {
        "rope_axes": "model.llm.rope_axes is null; needed: sections of three axes, interleaved: true",
        "level_layers": "model.llm.level_layers is []; needed: [1, 3]",
    }.items():
        other = replace(whole.llm, **{change: None if change == "rope_axes" else ()})
        assert fitting(replace(whole, llm=other))[1]["Qwen3-VL"] == [words]
