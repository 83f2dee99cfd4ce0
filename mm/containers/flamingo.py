"""Audio Flamingo 3: its sound tower, Llava's projector, any language model, positions in one axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders.hf import open_folder
from encoders.hf.folder import family_name
from encoders.hf.write import Written
from mm.containers.container import Container, Place, Token, Whole
from mm.containers.fit import check_head, language_unfit, mlp_unfit, needed
from mm.containers.llava import PROJECTED, PROJECTOR, language, only, two_linears
from parallel.published import SafeFolder

MODULE, TOWER = "audio", "audioflamingo3"


def unfit(whole: Whole) -> list[str]:
    if len(whole.towers) != 1:
        given = ", ".join(whole.towers) or "none"
        return [f"the encoder modules are {given}; needed: one, of sound"]
    module, tower = only(whole)
    if family_name(tower.cls) != TOWER:
        return [needed(f"model.{module}.encoder", tower.encoder, TOWER)]
    return mlp_unfit(module, tower, whole.llm.d_model, norm="none") + language_unfit(whole.llm, own_head=True)


def config(whole: Whole, text: Mapping[str, Any], towers: Mapping[str, Written]) -> dict[str, Any]:
    module, tower = only(whole)
    return {
        "text_config": dict(text),
        "audio_config": dict(towers[module].config),
        "projector_hidden_act": PROJECTED[tower.projector.activation],
        "projector_bias": tower.projector.bias,
        "tie_word_embeddings": whole.llm.tied,
    }


def processor(whole: Whole, towers: Mapping[str, Written], texts: Mapping[str, str]) -> dict[str, Any]:
    return {"processor_class": "AudioFlamingo3Processor", "audio_token": texts[only(whole)[0]]}


def modules(folder: SafeFolder) -> dict[str, dict[str, Any]]:
    check_head(folder)
    opened = open_folder(folder.path)
    projector = two_linears(folder, "projector_bias")
    return {MODULE: {"encoder": opened.family.encoder, "options": {}, "projector": projector}}


FLAMINGO = Container(
    name="audioflamingo3",
    title="Audio Flamingo 3",
    architecture="AudioFlamingo3ForConditionalGeneration",
    hint="one sound tower, projector {kind: mlp, norm: none, hidden: as wide as the language model}",
    unfit=unfit,
    language=language,
    places={"audio": Place("audio_tower.", PROJECTOR)},
    tokens={"audio": Token("<sound>", "audio_token_id", "audio_token")},
    config=config,
    processor=processor,
    modules=modules,
)
