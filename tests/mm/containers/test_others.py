"""Audio Flamingo 3, Nemotron Omni, folders with a card; what fits no container, and folders that are bad."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import mm
from encoders.contract import ItemBatch
from encoders.hf.write import written
from encoders.vision import families
from encoders.vision.config import Pictures
from mm.cli import main
from mm.config.schema import from_mapping
from mm.containers.registry import CONTAINERS, fitting, misfits
from mm.containers.write import files_of, with_constants
from mm.errors import CheckpointError, Refused
from mm.plan.blueprint import draw_up
from mm.plan.whole import whole_of
from mm.report.header import export_lines
from parallel.published import module_tensors, write_folder
from tests.llm.families import config_of, options
from tests.llm.folders import differing, read_all
from tests.llm.widened import Widened
from tests.mm.containers import made
from tests.mm.harness import small
from tests.slow import on_demand

import transformers  # isort: skip
from transformers.models.nemotron_h_omni import configuration_nemotron_h_omni as omni_config  # isort: skip
from transformers.models.nemotron_h_omni import modeling_nemotron_h_omni as omni_model  # isort: skip

TINY: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24}


def flamingo(family: str, seed: int) -> Any:
    tower = transformers.AudioFlamingo3EncoderConfig(
        **TINY, num_mel_bins=16, intermediate_size=36, max_source_positions=20
    )
    cfg = transformers.AudioFlamingo3Config(
        audio_config=tower,
        text_config=made.language(family, seed),
        audio_token_id=made.AUDIO,
        projector_bias=seed % 2 == 0,
    )
    return made.randomized(made._built(transformers.AudioFlamingo3ForConditionalGeneration, cfg), seed)


@pytest.mark.parametrize("family", on_demand(["qwen2", "llama", "nemotron_h"], ["llama", "nemotron_h"]))
def test_audio_flamingo(family: str, tmp_path: Path) -> None:
    """Clips of odd and even lengths: logits and gradients to 1e-10, and the same bytes both ways."""
    theirs = flamingo(family, 2)
    folder = made.saved(theirs, tmp_path / "in")
    lengths = [40, 17, 23, 4]
    frames = torch.randn(4, 16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.arange(40)[None] < torch.tensor(lengths)[:, None]).int()
    blueprint, modules = made.ours(folder)
    metas = tuple({"frames": n} for n in lengths)
    found = modules["audio"](ItemBatch(frames.transpose(1, 2).reshape(-1, 16), (40,) * 4, metas))
    assert found.rows == (10, 4, 6, 1)
    ids = made.asked(sum(found.rows), made.AUDIO)
    mine = made.logits_of(modules, ids, {"audio": (made.AUDIO, found.values)})
    with Widened():
        expected = theirs(input_ids=ids, input_features=frames, input_features_mask=mask).logits[0]
    assert made.far(mine, expected) < 1e-10
    for way in (mine, expected):
        (way**2).sum().backward()
    given_back = made.our_gradients(blueprint, modules)
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "run")]) == 0
    assert main(["checkpoint", "export", str(tmp_path / "run/step-00000000"), str(tmp_path / "out")]) == 0
    assert not differing(read_all(tmp_path / "out"), read_all(folder))
    _, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    made.hold_gradients(given_back, made.their_gradients(theirs, tmp_path / "grads"), 1e-10)


def omni(sound: bool) -> Any:
    vision = {**TINY, "patch_size": 4, "max_img_size": 24, "num_cls_tokens": 2, "num_registers": 3}
    audio = {
        **TINY,
        "num_attention_heads": 2,
        "intermediate_size": 36,
        "num_mel_bins": 16,
        "subsampling_conv_channels": 8,
        "conv_kernel_size": 5,
        "attention_bias": False,
        "scale_input": False,
        "projection_hidden_size": 20,
        "projection_bias": True,
    }
    cfg = omni_config.NemotronH_Omni_Reasoning_V3_Config(
        text_config=config_of("nemotron_h", {**options("nemotron_h", 1), "vocab_size": 448}).to_dict(),
        vision_config={**vision, "mlp_ratio": 2.0, "video_temporal_patch_size": 2},
        audio_config=audio if sound else None,
        vision_hidden_size=24,
        projector_hidden_size=28,
        image_token_id=made.IMAGE,
        audio_token_id=made.AUDIO,
    )
    model = made.randomized(omni_model.NemotronH_Omni_Reasoning_V3(cfg), 1)
    if sound:
        model.audio_tower.double()
    model.vision_model.config.torch_dtype = torch.float64
    return model


@pytest.mark.parametrize("sound", on_demand([True, False], [True, False]))
def test_nemotron_omni(sound: bool, tmp_path: Path) -> None:
    """Its norms are float32 in its own code, so that logits equal to 1e-7; the same bytes, but for video."""
    theirs = omni(sound)
    folder = made.saved(theirs, tmp_path / "in")
    pixels = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, modules = made.ours(folder)
    packed = pixels.view(3, 4, 4, 6, 4).permute(1, 3, 0, 2, 4).reshape(24, 48)
    from encoders.hf.processor import dense_batch

    rows = modules["vision"](dense_batch(modules["vision"].cfg, pixels)).values
    asked: dict[str, Any] = {"pixel_values": packed, "image_grid_hw": torch.tensor([[4, 6]])}
    places, ids = {"vision": (made.IMAGE, rows)}, made.asked(len(rows), made.IMAGE)
    if sound:
        frames = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        heard = modules["audio"](ItemBatch(frames[0], (50,), ({"frames": 50},))).values
        places["audio"] = (made.AUDIO, heard)
        asked["input_features"] = frames
        ids = torch.cat([ids, torch.full((1, len(heard)), made.AUDIO), ids[:, :2]], 1)
    with torch.no_grad():
        expected = theirs(input_ids=ids, **asked, use_cache=False).logits[0]
    assert made.far(made.logits_of(modules, ids, places), expected) < 1e-6
    assert main(["checkpoint", "import", str(folder), str(tmp_path / "run")]) == 0
    assert main(["checkpoint", "export", str(tmp_path / "run/step-00000000"), str(tmp_path / "out")]) == 0
    out, read = read_all(tmp_path / "out"), read_all(folder)
    assert differing(out, read) == ["vision_model.radio_model.model.patch_generator.video_embedder.weight"]
    _, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(st.data())
def test_what_is_said_of_a_tower_reads_back(data: st.DataObject) -> None:
    """Random options of each family: written() tries itself that they read back, and refuses by name."""
    draw = data.draw
    heads = draw(st.integers(1, 3))
    sizes: dict[str, Any] = {"heads": heads, "width": 8 * heads, "layers": draw(st.integers(1, 3))}
    sizes["mlp"] = draw(st.integers(1, 40))
    sizes["eps"] = draw(st.sampled_from([1e-5, 1e-6, 1e-12]))
    side = draw(st.integers(2, 6))
    exact = {"height": side * 4, "width": side * 4, "mean": (0.1, 0.2, 0.3)}
    for cls in (families.Siglip, families.Clip, families.ImageViT, families.Dinov2, families.Dinov3):
        base = cls.Config()
        fit = draw(st.sampled_from(["exact", "crop"]))
        edge = side * 4 + draw(st.integers(0, 9)) if fit == "crop" else side * 4
        pictures = replace(base.pictures, fit=fit, edge=edge, **exact)
        table = 0 if cls is families.Dinov3 else side
        cfg = replace(base, patch=4, table=table, pictures=pictures, **sizes)
        assert written(cls, cfg).config["num_hidden_layers"] == sizes["layers"]
    with pytest.raises(ValueError, match=r"a clip_vision_model folder has no tensor for registers"):
        written(families.Clip, replace(families.Clip.Config(), registers=2))
    with pytest.raises(ValueError, match="of no published family that can be written"):
        written(object, Pictures())  # type: ignore[arg-type]


def config(**vision: Any) -> dict[str, Any]:
    raw = small()
    projector = {"activation": "gelu", "bias": True, "norm": "none", "hidden": 24}
    pictures = {"fit": "exact", "height": 16, "width": 16}
    tower = {"patch": 4, "table": 4, "width": 24, "heads": 3, "layers": 2, "mlp": 36, "final_norm": False}
    raw["model"] = {
        "vision": {
            "encoder": "siglip",
            "projector": {**projector, **vision.pop("projector", {})},
            "options": {**tower, "pictures": pictures, **vision.pop("options", {})},
        },
        "llm": {"pattern": "*-", "d_model": 24, "n_heads": 2, "head_dim": 8, "n_kv_heads": 1, "mlp_ffn": 32},
    }
    raw["layout"], raw["eval"] = {}, {"every": 0}
    return raw


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"projector": {"norm": "rms"}}, r"vision.projector.norm is rms; needed: none"),
    ({"projector": {"kind": "linear"}}, r"vision.projector.kind is linear; needed: mlp"),
    ({"projector": {"hidden": 32}}, r"projector.hidden is 32; needed: 24, as wide as the language model"),
    ({"options": {"final_norm": True}}, r"options.final_norm is true; needed: false"),
    ({"options": {"merge": 2}}, r"options.merge is 2; needed: 1"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_what_no_container_holds_is_said_at_the_start(
    change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """By option, with what would fit; and what would fit does."""
    fits = draw_up(from_mapping(config(), tmp_path), 1)
    assert export_lines(fits) == ["as Llava: LlavaForConditionalGeneration of transformers"]
    blueprint = draw_up(from_mapping(config(**change), tmp_path), 1)
    said = export_lines(blueprint)
    assert "no container of transformers holds this model" in said[0]
    assert len(said) == 2 and why.replace("\\", "") in said[1], said
    assert fitting(whole_of(blueprint))[0] is None and misfits(CONTAINERS["llava"], whole_of(blueprint))


@pytest.mark.parametrize(
    ("projector", "said"),
    [
        ({"norm": "layer", "hidden": 20}, "layer norm, linear 24 -> 20, gelu, linear -> 24 (with bias)"),
        (
            {
                "kind": "resampler",
                "bias": False,
                "queries": 3,
                "depth": 1,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 8,
            },
            "resampler (3 rows of an item, 1 layers, gelu) -> 24",
        ),
    ],
)
def test_a_folder_with_a_card_is_read_back_whole(
    projector: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """A published encoder with levels of features and an own projector each, joined by the card alone."""
    raw = config(projector=projector, options={"levels": [0], "final_norm": True})
    raw["model"]["llm"]["level_layers"] = [1]
    blueprint = draw_up(from_mapping(raw, tmp_path), 1)
    from mm.checkpoint.alone import alone
    from mm.checkpoint.folders import export_hf
    from mm.config.schema import resolve
    from mm.data.tokenizer import make_tokenizer
    from mm.plan.blueprint import bare_module
    from parallel import checkpoint as store
    from parallel.topology.axis import Axes

    modules = {m: bare_module(blueprint, m, Axes(), s[0], "cpu") for m, s in blueprint.stages.items()}
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in modules.values():
            for p in module.state_dict().values():
                p.copy_(torch.randn(p.shape, generator=gen))
    tensors = {f"{m}.{k}": t for m, x in modules.items() for k, t in module_tensors(x).items()}
    with alone():
        path = store.save(tmp_path / "run", 0, tensors, {"config": resolve(blueprint.cfg)}, keep=0)
    assert "a folder a module" in export_hf(path, tmp_path / "out", None)
    tokenizer = make_tokenizer("bytes")
    back = mm.load(tmp_path / "out")
    held = {"llm": back.llm, **back.encoders}
    for name, module in modules.items():
        assert not differing(module_tensors(held[name]), module_tensors(module)), name
    assert back.begin == (tokenizer.bos,) and back.llm.cfg.level_layers == (1,)
    tower = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out" / "vision")
    own = tower.state_dict()
    assert own.pop("embeddings.position_embedding.weight").equal(modules["vision"].encoder.position)
    assert tower.config.num_hidden_layers == 2 and tower.config.vision_use_head is False
    text = (tmp_path / "out" / "README.md").read_text()
    assert said in text
    (tmp_path / "out" / "polyrank.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"polyrank.json is unreadable"):
        mm.load(tmp_path / "out")


def test_bad_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = made.llava("siglip", "llama", 0)
    folder = made.saved(theirs, tmp_path / "in")
    said = json.loads((folder / "config.json").read_text())

    def changed(name: str, **fields: Any) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "config.json").write_text(json.dumps({**said, **fields}))
        return copy

    for name, fields, why in (
        ("kind", {"model_type": "llava_xl"}, "no whole model that is known here; known: llava"),
        ("layers", {"vision_feature_layer": [-1, -2]}, "needed: one layer"),
        ("layer", {"vision_feature_layer": -9}, "needed: one of the 3 layers"),
        ("rows", {"vision_feature_select_strategy": "default"}, "which drops one row of each picture"),
        ("act", {"projector_hidden_act": "mish"}, "projector_hidden_act='mish'; known: silu"),
    ):
        raw = {"model": {"folder": str(changed(name, **fields))}, "data": {"train": ["x"]}}
        with pytest.raises(Refused, match="model.folder: .*" + why):
            from_mapping({**raw, "train": {"steps": 1, "global_batch": 1}}, tmp_path)
    wide = {**said["text_config"], "hidden_size": 2 * said["text_config"]["hidden_size"]}
    assert main(["generate", str(changed("wide", text_config=wide)), "--text", "a"]) == 4
    assert "has shape" in capsys.readouterr().err
    torn = tmp_path / "torn"
    theirs.save_pretrained(torn, max_shard_size="60KB")
    next(torn.glob("*-00002-*.safetensors")).unlink()
    assert main(["checkpoint", "import", str(torn), str(tmp_path / "no")]) == 4
    assert "is missing or no safetensors file" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"folder": str(tmp_path / "gone")}}))
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_config_changes_what_a_folder_says(tmp_path: Path) -> None:
    """Keys go before the folder's; another projector starts anew, the same keeps its weights."""
    folder = made.saved(made.llava("clip", "llama", 1), tmp_path / "in")

    def read(**vision: Any) -> Any:
        raw = {"model": {"folder": str(folder), "vision": vision}, "data": {"train": ["x"]}}
        return from_mapping({**raw, "train": {"steps": 1, "global_batch": 1}}, tmp_path)

    plain = read(freeze="encoder")
    vision = plain.model["vision"]
    assert vision.freeze == "encoder" and vision.weights == vision.projector.weights == str(folder)
    assert plain.llm["preset"] == plain.data.tokenizer == plain.checkpoint.weights == str(folder)
    other = read(projector={"kind": "linear"}).model["vision"]
    assert other.projector.weights is None and other.weights == str(folder)
    whole = whole_of(draw_up(plain, 1))
    files = files_of(CONTAINERS["llava"], whole, {"vision": (5, "<image>")})
    values = {n: torch.zeros(s) for n, s in files.contents.shapes.items()}
    fetch = with_constants(lambda names: {n: values[n] for n in names}, files.constants)
    out = write_folder(files.contents, fetch, tmp_path / "half", torch.bfloat16, 1 << 20)
    kinds = {t.dtype for t in read_all(out).values()}
    assert kinds == {torch.bfloat16}
