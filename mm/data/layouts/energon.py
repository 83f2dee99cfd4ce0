"""Folders of Megatron-Energon: its .nv-meta/dataset.yaml says which parts of a sample are what.

Formats: Megatron-Energon's documentation, "Dataset Format on Disk".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mm.data.layouts.find import AUTO, layout_name
from mm.errors import DataError

META = ".nv-meta"
MEANS: dict[str, list[dict[str, Any]]] = {  # by class of sample, its fields as segments
    "CaptioningSample": [{"vision": "image"}, {"text": "caption", "depends": "vision"}],
    "OCRSample": [{"vision": "image"}, {"text": "text", "depends": "vision"}],
    "TextSample": [{"text": "text"}],
    "VQASample": [
        {"vision": "image"},
        {"text": "context", "loss": False},
        {"text": "answers", "depends": "vision"},
    ],
}


def meta_folder(path: Path) -> Path | None:
    """The folder .nv-meta of the data set that a file or folder is in; None where there is none."""
    return next((p / META for p in (path, *path.parents[:3]) if (p / META / "dataset.yaml").is_file()), None)


def energon_mapping(meta: Path) -> Mapping[str, Any] | None:
    """The mapping that dataset.yaml stands for; None where it leaves the samples as they are.

    Raises DataError for what code of its own would have to read.
    """
    file = meta / "dataset.yaml"
    found = _load(file)
    fields, kind = found.get("field_map"), found.get("sample_type")
    name = kind.get("__class__") if isinstance(kind, Mapping) else kind
    if found.get("sample_loader") is not None or name == "CrudeWebdataset":
        if found.get("sample_loader") is None:
            return None
        raise DataError(
            f"{file} names code of its own that reads samples (sample_loader), which is not run; needed: "
            "data.layout (or --layout) with a mapping of fields, or a module:function"
        )
    if fields is None:
        return None
    if name not in MEANS or not isinstance(fields, Mapping):
        raise DataError(
            f"{file} has samples of type {name!r}; known: {', '.join(MEANS)}. Needed for others: data.layout "
            "(or --layout) with a mapping of fields"
        )
    theirs = {ours: _path(str(where)) for ours, where in fields.items()}
    if isinstance(fields.get("answers"), str) and name == "VQASample":
        theirs["answers"] = f"{theirs['answers']}[0];{theirs['answers']}"  # a list has its best answer first
    return {"segments": MEANS[name], "fields": theirs}


def layout_of_shard(layout: str, shard: Path) -> str:
    """The layout of a shard's samples: what its .nv-meta says where "auto" is asked for. Raises DataError."""
    meta = meta_folder(shard.parent) if layout == AUTO else None
    mapping = None if meta is None else energon_mapping(meta)
    return layout if mapping is None else layout_name(mapping)


def split_parts(folder: Path, split: str | None) -> list[Path]:
    """The tars of an Energon folder in a split of split.yaml; all of its .info file where split is None.

    Raises DataError.
    """
    meta = folder / META
    if split is None:
        info = next((_load(meta / f) for f in (".info.json", ".info.yaml") if (meta / f).is_file()), {})
        names = list(info.get("shard_counts", {})) or [
            str(p.relative_to(folder)) for p in sorted(folder.rglob("*.tar"))
        ]
        return [folder / name for name in names]
    found = _load(meta / "split.yaml")
    parts = found.get("split_parts", {})
    if split not in parts:
        raise DataError(f"{meta / 'split.yaml'} has no split {split!r}; it has {', '.join(parts) or 'none'}")
    left_out = set(found.get("exclude", []) or [])
    names = [name for name in parts[split] if name not in left_out]
    return [path for name in names for path in _matching(folder, name)]


def _matching(folder: Path, name: str) -> list[Path]:
    import braceexpand

    return [folder / one for one in braceexpand.braceexpand(name)]


def _path(where: str) -> str:
    """A field of field_map as ours: json[caption] is the field caption of the json."""
    return ";".join(one.strip().removeprefix("json[").replace("]", "", 1) if one.strip().startswith("json[")
                    else one.strip() for one in where.split(";"))  # fmt: skip


def _load(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} has {found!r:.80}; needed: a mapping")
    return found
