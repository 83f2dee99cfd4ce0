"""The language model inside the folder of a whole model: its section of config.json, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm.hf.family import Data
from llm.hf.registry import FAMILIES, family_named
from parallel.published import SafeFolder

HEAD = "lm_head.weight"
SECTIONS = ("text_config", "llm_config")
# What whole models put beside a language model that has no name of its own in front.
BESIDE = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector", "language_model")


def section_of(data: Data) -> Mapping[str, Any] | None:
    """The section of a whole model's config.json that is its language model's; None for a model alone."""
    if data.get("model_type") in FAMILIES:
        return None
    found = (data[name] for name in SECTIONS if isinstance(data.get(name), Mapping))
    return next((x for x in found if x.get("model_type") in FAMILIES), None)


def language_config(data: Data) -> Data:
    """config.json of the language model in a folder, which a whole model has as a section.

    Its embedding is tied where either level says so.
    """
    section = section_of(data)
    if section is None:
        return data
    return {**section, "tie_word_embeddings": True} if data.get("tie_word_embeddings") else section


def language_part(folder: SafeFolder) -> SafeFolder:
    """The language model of a folder as a folder of its own: its config.json, and its keys as it is saved
    alone. Tensors of other parts of a whole model are left out."""
    config = language_config(folder.config())
    if config is folder.config() or section_of(folder.config()) is None:
        return folder
    family = family_named(str(config["model_type"]))
    bare = family.embedding.removeprefix(family.stem)
    found = sorted(k for k in folder.shapes() if k == bare or k.endswith("." + bare))
    if not found:
        raise ValueError(
            f"{folder.path} has no tensor {bare}, as a {family.title} model has; needed: the whole folder"
        )
    before = min(found, key=len).removesuffix(bare)
    root = before.removesuffix("model.").removesuffix(family.stem)
    names = {}
    for key in folder.shapes():
        inner = key.removeprefix(before)
        if key == HEAD or key.endswith("." + HEAD):
            names[key] = HEAD
        elif key.startswith(before) and inner.split(".")[0] not in BESIDE:
            names[key] = family.stem + inner
        elif key.startswith(root + "mtp."):
            names[key] = key.removeprefix(root)
    return folder.part(names, config)
