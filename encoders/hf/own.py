"""Folders of encoders that no published format holds: our names of tensors, our options in config.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from encoders.contract import Encoder
from parallel.published import FileTensor, SafeFolder, check_tensors, module_shapes
from parallel.published.tables import Part
from parallel.topology.axis import Axes

OWN = "polyrank"  # model_type in config.json


def own_config(encoder: str, cfg: Any) -> dict[str, Any]:
    """config.json of an encoder. encoder: the name of its class in a config; cfg: its options."""
    return {"model_type": OWN, "encoder": encoder, "options": asdict(cfg)}


def own_tensors(cls: type[Encoder], cfg: Any, before: str = "") -> list[FileTensor]:
    """The tensors of an encoder, each a parameter of a name that begins with `before`."""
    shapes = module_shapes(cls(cfg, Axes(), device="meta", dtype=None))
    return [FileTensor(n, shape, (Part(before + n),)) for n, shape in shapes.items()]


def is_own(path: str | Path) -> bool:
    """Whether a folder is of such an encoder. Raises ValueError where it is no folder of weights."""
    return SafeFolder(path).config().get("model_type") == OWN


def open_own(
    path: str | Path, encoder: str, cls: type[Encoder], cfg: Any
) -> tuple[list[FileTensor], SafeFolder]:
    """The tensors of a folder that is_own(), for an encoder of these options; reads no tensor data.

    Raises ValueError where the folder is of another encoder, of other options, or tensors do not fit.
    """
    folder = SafeFolder(path)
    own_options(path, encoder, cfg)
    tensors = own_tensors(cls, cfg)
    check_tensors(tensors, folder.shapes(), str(folder.path))
    return tensors, folder


def own_options(path: str | Path, encoder: str, cfg: Any) -> Any:
    """The options; raises ValueError unless a folder that is_own() is of this encoder with these options."""
    said, mine = SafeFolder(path).config(), json.loads(json.dumps(own_config(encoder, cfg)))
    theirs, given = said.get("options") or {}, mine["options"]
    wrong = [f"encoder={said.get('encoder')!r}, not {encoder!r}"] if said.get("encoder") != encoder else []
    names = sorted(k for k in {*theirs, *given} if theirs.get(k) != given.get(k))
    wrong += [f"{k}={theirs.get(k)!r}, not {given.get(k)!r}" for k in names]
    if wrong:
        raise ValueError(f"{path} has {'; '.join(wrong)}; needed: the same encoder and options")
    return cfg
