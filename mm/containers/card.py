"""A folder a module with a card, for models that no container holds.

The folder itself is the language model's. Each encoder has a folder of its name in it, of its family where it
is published, and the projector's in that. polyrank.json says how they join, README.md the same to people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoders.hf.own import own_config, own_tensors
from encoders.hf.write import Written, written
from mm.containers.container import Tower, Whole
from mm.containers.write import constants_of, moved, projector_shapes
from parallel.published import Contents, FileTensor, Shape
from parallel.published.tables import Part

CARD = "polyrank.json"
README = "README.md"
PROJECTOR = "projector"  # folder in an encoder's


def card_of(whole: Whole, tokens: Mapping[str, int]) -> dict[str, Any]:
    """polyrank.json of a model. tokens: by module, the id in the place of its rows."""
    modules = {}
    for name, tower in whole.towers.items():
        modules[name] = {
            "encoder": tower.encoder,
            "options": asdict(tower.cfg),
            "published": published(tower) is not None,
            "projector": tower.projector_config,
            "token": tokens[name],
        }
    return {"format": 1, "level_layers": list(whole.llm.level_layers), "modules": modules}


def published(tower: Tower) -> Written | None:
    """An encoder as its family writes it; None where it is of none, or its options cannot be said."""
    try:
        return written(tower.cls, tower.cfg)
    except ValueError:
        return None


def encoder_contents(name: str, tower: Tower) -> tuple[Contents, Mapping[str, Any], Written | None]:
    """The folder of an encoder: its files without the values, what no parameter holds, and how its family
    writes it, where it is of one. Names are those of a checkpoint."""
    said = published(tower)
    before = f"{name}.encoder."
    if said is None:
        tensors = own_tensors(tower.cls, tower.cfg, before)
        shapes = {t.parts[0].name: t.shape for t in tensors}
        return Contents(tensors, shapes, own_config(tower.encoder, tower.cfg)), {}, None
    constants = constants_of(said.rest, "")
    tensors = [moved(t, said.stem + t.key, before) for t in said.tensors]
    tensors += [FileTensor(n[1:], tuple(t.shape), (Part(n),)) for n, t in constants.items()]
    known = {before + n: s for n, s in said.shapes.items()}
    known |= {n: tuple(t.shape) for n, t in constants.items()}
    return Contents(tensors, known, said.config), constants, said


def projector_contents(name: str, tower: Tower, d_model: int) -> Contents | None:
    """The folder of a module's projectors, one for each level of its features, under our names; None for one
    without parameters."""
    one, tensors = projector_shapes(tower, d_model), []
    known: dict[str, Shape] = {}
    for level in range(tower.cls.feature_levels(tower.cfg)) if one else ():
        before = f"{name}.projector." if level == 0 else f"{name}.level_projectors.{level - 1}."
        tensors += [FileTensor(level_key(level) + n, s, (Part(before + n),)) for n, s in one.items()]
        known |= {before + n: s for n, s in one.items()}
    if not tensors:
        return None
    config = {"model_type": "polyrank_projector", **tower.projector_config}
    return Contents(tensors, known, config)


def level_key(level: int) -> str:
    """What the keys of a level's projector begin with in a projector's folder."""
    return f"levels.{level}." if level else ""


def level_of(key: str) -> int:
    """The level of a key in a projector's folder."""
    return int(key.split(".")[1]) if key.startswith("levels.") else 0


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a folder; None where it has none. Raises ValueError where it is damaged."""
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        assert isinstance(found["modules"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ValueError(
            f"{file} is unreadable: {error!r}; needed: as `checkpoint export` writes it"
        ) from error
    return dict(found)


def modules_of_card(folder: Path, card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The encoder modules of a card, as a config names them, with the folders of their weights."""
    out = {}
    for name, module in card["modules"].items():
        projector = dict(module["projector"])
        if projector["kind"] != "none":
            projector["weights"] = str(folder)
        out[name] = {
            "encoder": module["encoder"],
            "weights": str(folder / name),
            "options": module["options"],
            "projector": projector,
        }
    return out


def readme(whole: Whole, card: Mapping[str, Any], reasons: Mapping[str, list[str]]) -> str:
    """README.md: how the modules join. reasons: by container, why it cannot hold the model."""
    lines = ["# A model of several modules", ""]
    lines += [
        "This folder is the language model, as transformers reads it, with its tokenizer. Beside it lie:",
        "",
    ]
    for name, module in card["modules"].items():
        tower, projector = whole.towers[name], module["projector"]
        kind = "as its family in transformers" if module["published"] else "under Polyrank's names"
        lines.append(f"- `{name}/`: the encoder `{module['encoder']}`, {kind};")
        if projector["kind"] != "none":
            lines.append(
                f"- `{name}/{PROJECTOR}/`: its projector, {projector_text(tower, whole.llm.d_model)};"
            )
        lines.append(
            f"  its rows take the places of the token {module['token']}, one each, in the order of the items."
        )
    lines += ["", f"`{CARD}` says the same to programs. Polyrank reads all of it:", ""]
    lines += ["    python -m mm generate FOLDER --text ..", '    model = mm.load("FOLDER")', ""]
    lines += ["No container of transformers holds this model:", ""]
    lines += [f"- {title}: {why}." for title, found in reasons.items() for why in found]
    return "\n".join(lines) + "\n"


def projector_text(tower: Tower, d_model: int) -> str:
    """What a projector computes."""
    kind, width = tower.projector, tower.cls.feature_width(tower.cfg)
    norm = "" if kind.norm == "none" else {"rms": "RMS norm, ", "layer": "layer norm, "}[kind.norm]
    bias = "with" if kind.bias else "without"
    if kind.kind == "resampler":
        made = f"{kind.sizes.queries} rows of an item, {kind.sizes.depth} layers, {kind.activation}"
        return f"{norm}linear {width} -> {tower.hidden}, resampler ({made}) -> {d_model}"
    if kind.kind == "linear":
        return f"{norm}linear {width} -> {d_model} ({bias} bias)"
    return f"{norm}linear {width} -> {tower.hidden}, {kind.activation}, linear -> {d_model} ({bias} bias)"
