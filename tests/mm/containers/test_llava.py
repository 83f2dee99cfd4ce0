"""Llava folders: what transformers writes is read to the same logits, and what is written it reads so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mm
from mm.cli import main
from tests.llm.folders import differing, read_all
from tests.mm.containers import made
from tests.slow import on_demand

import transformers  # isort: skip

PAIRS = [
    *(("clip", "llama", 1), ("dinov3", "gemma3_text", 2), ("siglip", "qwen3", 0), ("radio", "mixtral", 4)),
    *(("image_vit", "qwen2", 5), ("dinov2", "nemotron_h", 6), ("dinov2_giant", "phi3", 7)),
    *(("dinov2_registers", "olmo2", 8), ("dinov3_gated", "llama", 9), ("clip", "glm4_moe", 10)),
    *(("siglip", "smollm3", 11), ("radio", "bamba", 12), ("siglip", "mistral", 3), ("clip", "olmo3", 13)),
]


def outputs(model: Any, ids: Any, pixels: Any) -> Any:
    features = model.model.get_image_features(pixels, return_dict=True)
    return made.asked_of(model, ids, {"image": features})


@pytest.mark.parametrize(("tower", "family", "seed"), on_demand(PAIRS, PAIRS[1:], several=True))
def test_logits_gradients_and_both_ways(tower: str, family: str, seed: int, tmp_path: Path) -> None:
    """Read: logits and all gradients equal transformers' to 1e-10 in float64. Written: the same bytes, loaded
    by transformers with nothing missing or left over, to the same logits."""
    theirs = made.llava(tower, family, seed)
    folder = made.saved(theirs, tmp_path / "in")
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    blueprint, modules = made.ours(folder)
    rows = made.picture_rows(modules["vision"], pixels)
    ids = made.asked(len(rows), made.IMAGE)
    given, expected = (
        made.logits_of(modules, ids, {"vision": (made.IMAGE, rows)}),
        outputs(theirs, ids, pixels),
    )
    assert made.far(given, expected) < 1e-10
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "run")]) == 0
    assert main(["checkpoint", "export", str(tmp_path / "run/step-00000000"), str(tmp_path / "out")]) == 0
    written, read = made.named(read_all(tmp_path / "out")), made.named(read_all(folder))
    unread = {k for k in read if _unread(k, written)}
    assert not read.keys() - written.keys() - unread
    assert not differing(*({k: x[k] for k in read.keys() & written.keys() - unread} for x in (written, read)))
    again, found = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    lacking = {k for k in found["missing_keys"] if "pooler" not in k and "mask_token" not in k}
    assert not lacking and not found["unexpected_keys"] and not found["mismatched_keys"], found
    with torch.no_grad():
        assert (
            made.far(outputs(made.prepare(again.eval()), ids, pixels), expected) < 1e-6
        )  # rotary angles in float32
    for way in (given, expected):
        (way.double() ** 2).sum().backward()
    mine = made.our_gradients(blueprint, modules)
    made.hold_gradients(mine, made.their_gradients(theirs, tmp_path / "grads"), 1e-10)


def _unread(key: str, written: Any) -> bool:
    """What no row depends on: layers after the one that is taken, the norm after the last, poolers, masks."""
    if not key.startswith("vision_tower."):
        return False
    if re.search(r"\.(layers?|blocks)\.\d+\.", key):
        return key not in written
    tail = ("post_layernorm.", "pooler.", "mask_token", "tower.layernorm.", "tower.norm.", "tower.head.")
    return any(part in key for part in tail)


@pytest.mark.slow
def test_what_is_written_twice_is_the_same(tmp_path: Path) -> None:
    folder = made.saved(made.llava("siglip", "llama", 0), tmp_path / "in")
    for n, (source, out) in enumerate((("in", "one"), ("one", "two"))):
        assert main(["checkpoint", "import", str(tmp_path / source), str(tmp_path / f"run{n}")]) == 0
        step = str(tmp_path / f"run{n}" / "step-00000000")
        assert main(["checkpoint", "export", step, str(tmp_path / out)]) == 0
    assert folder.is_dir()
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_folder_is_asked_about_a_picture_as_transformers_asks_it(tmp_path: Path) -> None:
    """Token for token, greedy, through the processor that an export carries."""
    theirs = made.llava("clip", "llama", 1)
    made.saved(theirs, tmp_path / "in")
    assert main(["checkpoint", "import", str(tmp_path / "in"), str(tmp_path / "run")]) == 0
    assert main(["checkpoint", "export", str(tmp_path / "run/step-00000000"), str(tmp_path / "out")]) == 0
    folder, picture = tmp_path / "out", tmp_path / "p.png"
    Image.effect_noise((23, 31), 90).convert("RGB").save(picture)
    asks = ["--text", "the quick", "--image", str(picture), "--tokens", "9", "--json", str(tmp_path / "a")]
    assert main(["generate", str(folder), *asks]) == 0
    answer = json.loads((tmp_path / "a").read_text())["ids"]
    pictures = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    processor = transformers.LlavaProcessor(
        pictures,
        transformers.AutoTokenizer.from_pretrained(folder),
        **{
            k: v
            for k, v in json.loads((folder / "processor_config.json").read_text()).items()
            if k not in ("processor_class", "image_processor")
        },
    )
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    given = processor(
        text="<image>the quick", images=Image.open(picture), return_tensors="pt", truncation=False
    )
    given["pixel_values"] = given["pixel_values"].double()
    made_ids = model.generate(**given, do_sample=False, max_new_tokens=9)[0, given["input_ids"].shape[1] :]
    assert answer == made_ids.tolist()
    loaded = mm.load(folder)
    assert list(loaded.encoders) == ["vision"] and not any(m.training for m in loaded.llm.modules())
    assert load_file(folder / "model.safetensors").keys()
