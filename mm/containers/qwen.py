"""Qwen2.5-VL and Qwen3-VL: a tower with its merger, positions of three axes, levels in early layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.hf import open_folder
from encoders.hf.folder import family_name
from encoders.hf.write import Written
from llm.config import LLMConfig
from llm.hf.config import export_family
from mm.containers.container import Container, Place, Token, Tower, Whole
from mm.containers.fit import needed
from parallel.published import SafeFolder

MODULE = "vision"
TOKEN = Token("<|image_pad|>", "image_token_id", "image_token")
NAMED = {
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _unfit(whole: Whole, tower: str, family: str, *, interleaved: bool) -> list[str]:
    """What keeps a model from being one of a tower and a family of language models."""
    if len(whole.towers) != 1:
        given = ", ".join(whole.towers) or "none"
        return [f"the encoder modules are {given}; needed: one, of pictures"]
    ((module, held),) = whole.towers.items()
    if family_name(held.cls) != tower:
        return [needed(f"model.{module}.encoder", held.cls.__name__, tower)]
    out = _unfit_tower(module, held, whole.llm)
    try:
        found = export_family(whole.llm).name
        if found != family:
            out.append(needed("the family of model.llm", found, family))
    except ValueError as error:
        out.append(f"model.llm: {error}")
    axes = whole.llm.rope_axes
    if axes is None or axes.interleaved != interleaved:
        wanted = f"sections of three axes, interleaved: {str(interleaved).lower()}"
        out.append(needed("model.llm.rope_axes", axes, wanted))
    return out


def _unfit_tower(module: str, held: Tower, llm: LLMConfig) -> list[str]:
    out = []
    if held.projector.kind != "none":
        out.append(needed(f"model.{module}.projector.kind", held.projector.kind, "none"))
    entering = level_layers(len(held.cfg.levels))
    if llm.level_layers != entering:
        out.append(needed("model.llm.level_layers", list(llm.level_layers), list(entering)))
    return out


def unfit25(whole: Whole) -> list[str]:
    out = _unfit(whole, "qwen2_5_vl", "qwen2", interleaved=False)
    llm = whole.llm
    if llm.head_dim * llm.n_heads != llm.d_model:
        out.append(needed("model.llm.head_dim", llm.head_dim, "d_model / n_heads"))
    return out


def unfit3(whole: Whole) -> list[str]:
    out = _unfit(whole, "qwen3_vl", "qwen3", interleaved=True)
    if whole.llm.window is not None:
        out.append(needed("model.llm.window", whole.llm.window, None))
    return out


def level_layers(levels: int) -> tuple[int, ...]:
    """The layers after which levels enter: the MLPs of the first blocks, of two layers each."""
    return tuple(2 * k + 1 for k in range(levels))


# Keys of the plain family that the section has not.
OUTSIDE = ("architectures", "tie_word_embeddings")
WINDOWS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")


def _config(
    whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written], kind: str, *without: str
) -> dict[str, Any]:
    section = {key: value for key, value in text.items() if key not in (*OUTSIDE, *without)}
    (tower,) = towers.values()
    return {
        "text_config": {**section, "model_type": kind},
        "vision_config": dict(tower.config),
        "tie_word_embeddings": whole.llm.tied,
    }


def config25(whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written]) -> dict[str, Any]:
    return _config(whole, text, towers, "qwen2_5_vl_text", "head_dim")


def config3(whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written]) -> dict[str, Any]:
    return _config(whole, text, towers, "qwen3_vl_text", *WINDOWS)


def processor25(whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]) -> dict[str, Any]:
    return {"processor_class": "Qwen2_5_VLProcessor"}


def processor3(whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]) -> dict[str, Any]:
    return {"processor_class": "Qwen3VLProcessor"}


def modules(folder: SafeFolder) -> dict[str, dict[str, Any]]:
    opened = open_folder(folder.path)
    projector = {"kind": "none"}
    return {MODULE: {"encoder": opened.family.encoder, "options": {}, "projector": projector}}


def options(folder: SafeFolder) -> dict[str, Any]:
    levels = len(open_folder(folder.path).cfg.levels)
    return {"level_layers": list(level_layers(levels))} if levels else {}


QWEN25_VL = Container(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    hint="encoder qwen2_5_vl, projector {kind: none}, a Qwen 2 language model with rope_axes",
    unfit=unfit25,
    language=lambda key: key,
    places={"vision": Place("visual.")},
    tokens={"vision": TOKEN},
    config=config25,
    processor=processor25,
    modules=modules,
    named=NAMED,
)

QWEN3_VL = Container(
    name="qwen3_vl",
    title="Qwen3-VL",
    architecture="Qwen3VLForConditionalGeneration",
    hint="encoder qwen3_vl, projector {kind: none}, a Qwen 3 language model with rope_axes, interleaved",
    unfit=unfit3,
    language=lambda key: key.replace("model.", "model.language_model.", 1),
    places={"vision": Place("model.visual.")},
    tokens={"vision": TOKEN},
    config=config3,
    processor=processor3,
    modules=modules,
    options=options,
    named=NAMED,
)
