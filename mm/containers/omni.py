"""Nemotron Omni: RADIO with 2x2 patches a row, Nemotron-H, perhaps Parakeet; norm, squared ReLU between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.hf import open_folder
from encoders.hf.folder import family_name
from encoders.hf.saying import Rest
from encoders.hf.write import Written
from llm.hf.config import export_family
from mm.containers.container import Container, Pairs, Place, Token, Tower, Whole
from mm.containers.fit import language_unfit, needed
from parallel.published import SafeFolder

# By kind of module: its encoder, and whether its projector may have a bias.
TOWERS = {"vision": ("radio", False), "audio": ("parakeet", True)}
FRAMES = 2  # of a video that one patch spans in its class


def projector(first: str, one: str, two: str) -> Pairs:
    """A norm and two linear maps by their keys."""
    return (
        (f"{first}.weight", "norm"),
        (f"{one}.weight", "up.weight"),
        (f"{one}.bias", "up.bias"),
        (f"{two}.weight", "down.weight"),
        (f"{two}.bias", "bias"),
    )


PICTURES = projector("mlp1.0", "mlp1.1", "mlp1.3")
SOUND = projector("sound_projection.norm", "sound_projection.linear1", "sound_projection.linear2")


def unfit(whole: Whole) -> list[str]:
    kinds = sorted(whole.kinds.values())
    if kinds not in (["vision"], ["audio", "vision"]):
        given = ", ".join(f"{m} ({t.encoder})" for m, t in whole.towers.items()) or "none"
        return [f"the encoder modules are {given}; needed: radio, with or without parakeet"]
    out = language_unfit(whole.llm, own_head=False)
    if not out and (named := export_family(whole.llm).name) != "nemotron_h":
        out.append(needed("model.llm", f"written as {named}", "a Nemotron-H model"))
    for module, tower in whole.towers.items():
        out += _tower_unfit(module, tower, *TOWERS[whole.kinds[module]])
    return out


def _tower_unfit(module: str, tower: Tower, encoder: str, may_bias: bool) -> list[str]:
    if family_name(tower.cls) != encoder:
        return [needed(f"model.{module}.encoder", tower.encoder, encoder)]
    out, kind = [], tower.projector
    for option, value in (("kind", "mlp"), ("norm", "rms"), ("activation", "relu2")):
        if getattr(kind, option) != value:
            out.append(needed(f"model.{module}.projector.{option}", getattr(kind, option), value))
    if kind.bias and not may_bias:
        out.append(needed(f"model.{module}.projector.bias", True, False))
    if encoder == "radio":
        for option, wanted in (("merge", 2), ("levels", ()), ("prefix_rows", False)):
            given = getattr(tower.cfg, option)
            if given != wanted:
                out.append(needed(f"model.{module}.options.{option}", given, wanted))
    return out


def of_kind(whole: Whole, kind: str) -> str | None:
    """The module of a kind; None where there is none."""
    return next((m for m, k in whole.kinds.items() if k == kind), None)


def config(whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written]) -> dict[str, Any]:
    vision, audio = of_kind(whole, "vision"), of_kind(whole, "audio")
    assert vision is not None
    out: dict[str, Any] = {
        "text_config": dict(text),
        "vision_config": {**towers[vision].config, "video_temporal_patch_size": FRAMES},
        "downsample_ratio": 0.5,
        "vision_hidden_size": whole.towers[vision].cfg.width,
        "projector_hidden_size": whole.towers[vision].hidden,
        "video_temporal_patch_size": FRAMES,
    }
    if audio is not None:
        tower = whole.towers[audio]
        joined = {"projection_hidden_size": tower.hidden, "projection_bias": tower.projector.bias}
        out["audio_config"] = {**towers[audio].config, **joined}
    return out


def processor(whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]) -> dict[str, Any]:
    vision = of_kind(whole, "vision")
    assert vision is not None
    tower = whole.towers[vision].cfg
    pictures = {
        "image_processor_type": "NemotronH_Omni_Reasoning_V3ImageProcessor",
        "patch_size": tower.patch,
        "downsample_ratio": 0.5,
        "image_mean": list(tower.pictures.mean),
        "image_std": list(tower.pictures.std),
        "do_resize": False,
    }
    out: dict[str, Any] = {
        "processor_class": "NemotronH_Omni_Reasoning_V3Processor",
        "image_processor": pictures,
    }
    for kind, key in (("vision", "image_token"), ("audio", "audio_token")):
        module = of_kind(whole, kind)
        out |= {key: texts[module]} if module is not None else {}
    return out


def modules(folder: SafeFolder) -> dict[str, dict[str, Any]]:
    said, shapes = folder.config(), folder.shapes()
    if said.get("downsample_ratio", 0.5) != 0.5:
        raise ValueError(f"config.json has downsample_ratio={said['downsample_ratio']}; needed: 0.5")
    if any(k.startswith("vision_final_layernorm.") for k in shapes):
        raise ValueError("it has a norm after its vision tower, vision_final_layernorm; needed: none")
    out: dict[str, dict[str, Any]] = {}
    for kind, (encoder, _) in TOWERS.items():
        pairs = PLACES[kind].projector
        if pairs[0][0] not in shapes:
            continue
        open_folder(folder.path, encoder)
        net = {"kind": "mlp", "activation": "relu2", "norm": "rms", "bias": pairs[2][0] in shapes}
        options = {"merge": 2} if kind == "vision" else {}
        hidden = shapes[pairs[1][0]][0]
        out[kind] = {"encoder": encoder, "options": options, "projector": {**net, "hidden": hidden}}
    return out


def rest(tower: Tower, alone: Rest) -> Rest:
    """RADIO without its mean and std, which are its processor's here, and with patches of video, which are
    zero: ours has none."""
    if family_name(tower.cls) != "radio":
        return alone
    kept = {key: value for key, value in alone.items() if "input_conditioner" not in key}
    shape = (tower.cfg.width, FRAMES * tower.cfg.inputs)
    return {**kept, "radio_model.model.patch_generator.video_embedder.weight": (shape, 0.0)}


PLACES = {
    "vision": Place("vision_model.", PICTURES),
    "audio": Place("sound_encoder.encoder.", SOUND),
}

OMNI = Container(
    name="nemotron_h_omni",
    title="Nemotron Omni",
    architecture="NemotronH_Omni_Reasoning_V3",
    hint="radio with merge: 2, projector {kind: mlp, norm: rms, activation: relu2, bias: false}, Nemotron-H",
    unfit=unfit,
    language=lambda key: f"language_model.{key}",
    places=PLACES,
    tokens={
        "vision": Token("<image>", "image_token_id", "image_token"),
        "audio": Token("<so_embedding>", "audio_token_id", "audio_token"),
    },
    config=config,
    processor=processor,
    modules=modules,
    rest=rest,
)
