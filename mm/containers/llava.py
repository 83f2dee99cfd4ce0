"""Llava: one picture tower, two linear maps, most language models, positions in one axis.

Its rows are the hidden states after a layer of the tower, before the norm after the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.hf import open_folder
from encoders.hf.folder import family_name
from encoders.hf.said import ACTIVATIONS
from encoders.hf.write import Written
from encoders.vision.config import VisionConfig
from mm.containers.container import Container, Place, Token, Tower, Whole
from mm.containers.fit import check_head, language_unfit, mlp_unfit, needed
from parallel.published import SafeFolder

MODULE = "vision"
# The towers that LlavaForConditionalGeneration runs.
TOWERS = ("clip", "siglip", "image_vit", "dinov2", "dinov3", "radio")
# Towers whose class takes pictures of the size of its table alone.
ONE_SIZE = ("clip", "siglip", "image_vit")
PROJECTOR = (
    ("multi_modal_projector.linear_1.weight", "up.weight"),
    ("multi_modal_projector.linear_1.bias", "up.bias"),
    ("multi_modal_projector.linear_2.weight", "down.weight"),
    ("multi_modal_projector.linear_2.bias", "bias"),
)
# Names of transformers for activations that vision towers do not have.
PROJECTED = {**ACTIVATIONS, "relu2": "relu2"}


def only(whole: Whole) -> tuple[str, Tower]:
    """The one encoder module of a model, and its name."""
    ((module, tower),) = whole.towers.items()
    return module, tower


def unfit(whole: Whole) -> list[str]:
    if len(whole.towers) != 1:
        given = ", ".join(whole.towers) or "none"
        return [f"the encoder modules are {given}; needed: one, of pictures"]
    module, tower = only(whole)
    name = family_name(tower.cls)
    if name not in TOWERS:
        return [needed(f"model.{module}.encoder", tower.cls.__name__, " or ".join(TOWERS))]
    at, cfg = f"model.{module}.options", tower.cfg
    out = mlp_unfit(module, tower, whole.llm.d_model, norm="none") + language_unfit(whole.llm, own_head=True)
    for option, value in (("merge", 1), ("levels", ()), ("final_norm", False)):
        if getattr(cfg, option) != value:
            out.append(needed(f"{at}.{option}", getattr(cfg, option), value))
    if cfg.prefix > 1 and not cfg.prefix_rows:
        out.append(needed(f"{at}.prefix_rows", False, f"true, as it drops one of the {cfg.prefix} or none"))
    side = cfg.table * cfg.patch
    sizes = (cfg.pictures.height, cfg.pictures.width)
    if name in ONE_SIZE and (cfg.pictures.fit not in ("exact", "crop") or sizes != (side, side)):
        fit = f"fit {cfg.pictures.fit}, {sizes[0]} x {sizes[1]}"
        out.append(needed(f"{at}.pictures", fit, f"fit: exact or crop, {side} x {side} as its table"))
    return out


def _strategy(cfg: VisionConfig) -> str:
    """Whether it drops the first row of a picture, its class token."""
    return "default" if cfg.prefix and not cfg.prefix_rows else "full"


def config(whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written]) -> dict[str, Any]:
    module, tower = only(whole)
    cfg, kind = tower.cfg, tower.projector
    rows = (cfg.pictures.height // cfg.patch) * (cfg.pictures.width // cfg.patch)
    return {
        "text_config": dict(text),
        "vision_config": dict(towers[module].config),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": _strategy(cfg),
        "image_seq_length": rows + cfg.prefix * cfg.prefix_rows,
        "projector_hidden_act": PROJECTED[kind.activation],
        "multimodal_projector_bias": kind.bias,
        "tie_word_embeddings": whole.llm.tied,
    }


def processor(whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]) -> dict[str, Any]:
    module, tower = only(whole)
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.cfg.patch,
        "vision_feature_select_strategy": _strategy(tower.cfg),
        "num_additional_image_tokens": tower.cfg.prefix,
        "image_token": texts[module],
    }


def two_linears(folder: SafeFolder, bias: str) -> dict[str, Any]:
    """The projector of a folder, as a config has it. bias: the field that says whether its maps have one."""
    said = folder.config()
    known = {theirs: ours for ours, theirs in PROJECTED.items()}
    act = said.get("projector_hidden_act", "gelu")
    if act not in known:
        raise ValueError(f"config.json has projector_hidden_act={act!r}; known: {', '.join(known)}")
    found = folder.shapes().get(PROJECTOR[0][0])
    if found is None:
        raise ValueError(f"{folder.path} has no tensor {PROJECTOR[0][0]}; needed: the whole folder")
    return {
        "kind": "mlp",
        "activation": known[act],
        "bias": said.get(bias, True),
        "norm": "none",
        "hidden": found[0],
    }


def language(key: str) -> str:
    """The key of a language model's tensor in a container that holds any of them."""
    inner = key.removeprefix("backbone.")  # which Nemotron-H has alone
    return f"language_model.{key}" if inner == key else f"language_model.model.{inner}"


def modules(folder: SafeFolder) -> dict[str, dict[str, Any]]:
    check_head(folder)
    said = folder.config()
    opened = open_folder(folder.path)
    cfg = opened.cfg
    layer = said.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ValueError(
            f"config.json has vision_feature_layer={layer}; needed: one layer, as rows of several are "
            "not put side by side here"
        )
    layers = cfg.layers + 1 + layer if layer < 0 else layer
    if not 1 <= layers <= cfg.layers:
        raise ValueError(
            f"config.json has vision_feature_layer={layer}; needed: one of the {cfg.layers} layers, 1 to "
            f"{cfg.layers} or -{cfg.layers} to -1"
        )
    options: dict[str, Any] = {"layers": layers, "final_norm": False}
    strategy = said.get("vision_feature_select_strategy", "default")
    if strategy == "full":
        options |= {"prefix_rows": True} if cfg.prefix else {}
    elif cfg.prefix != 1:
        raise ValueError(
            f"config.json has vision_feature_select_strategy={strategy!r}, which drops one row of each "
            f"picture, and its tower puts {cfg.prefix} tokens before those of patches; needed: full"
        )
    projector = two_linears(folder, "multimodal_projector_bias")
    return {MODULE: {"encoder": opened.family.encoder, "options": options, "projector": projector}}


LLAVA = Container(
    name="llava",
    title="Llava",
    architecture="LlavaForConditionalGeneration",
    hint="one picture tower, projector {kind: mlp, norm: none, hidden: as wide as the language model}",
    unfit=unfit,
    language=language,
    places={"vision": Place("vision_tower.", PROJECTOR)},
    tokens={"vision": Token("<image>", "image_token_index", "image_token")},
    config=config,
    processor=processor,
    modules=modules,
)
