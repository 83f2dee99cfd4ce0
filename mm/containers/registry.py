"""Which containers there are, by model_type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoders.hf.folder import kind_of
from mm.containers.container import Container, Tower, Whole
from mm.containers.llava import LLAVA
from mm.containers.qwen import QWEN3_VL, QWEN25_VL
from mm.containers.write import projector_shapes, projector_tensors
from parallel.published import FileTensor, SafeFolder, check_tensors, stored_dtypes

# In the order in which they are tried.
ALL = (LLAVA, QWEN25_VL, QWEN3_VL)
CONTAINERS: dict[str, Container] = {c.name: c for c in ALL}


def container_of(folder: SafeFolder) -> Container | None:
    """The container that a folder's config.json names; None for a folder of one module."""
    return CONTAINERS.get(str(folder.config().get("model_type")))


def modules_of(path: Path) -> dict[str, dict[str, Any]]:
    """The encoder modules of a whole model's folder, as a config names them, with its weights.

    Raises ValueError where the folder is of no known container, and for what ours cannot be.
    """
    folder = SafeFolder(path)
    container = container_of(folder)
    if container is None:
        raise ValueError(
            f"{path} is of model_type {folder.config().get('model_type')}, which is no whole model that is "
            f"known here; known: {', '.join(CONTAINERS)}. A language model alone is model.llm.preset, an "
            "encoder alone model.<module>.weights"
        )
    found = container.modules(folder)
    return {
        name: {
            **module,
            "weights": str(path),
            "projector": {**module["projector"], **weights_of(container, module["projector"], path)},
        }
        for name, module in found.items()
    }


def language_options(path: Path) -> dict[str, Any]:
    """Options of the language model that a whole model's folder says outside of its section."""
    folder = SafeFolder(path)
    container = container_of(folder)
    return {} if container is None else container.language_options(folder)


def weights_of(container: Container, projector: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Where a projector has its weights; nothing where it has none."""
    return {} if projector["kind"] == "none" else {"weights": str(path)}


def projector_of(path: str | Path, tower: Tower, d_model: int) -> tuple[list[FileTensor], SafeFolder]:
    """The tensors of a module's projector in a whole model's folder.

    Raises ValueError where the folder is of no known container or has no such module, and where tensors are
    missing or of another shape.
    """
    folder = SafeFolder(path)
    container, kind = container_of(folder), kind_of(tower.cls)
    if container is None or kind not in container.places:
        raise ValueError(
            f"{path} is of model_type {folder.config().get('model_type')}, which has no projector of a "
            f"{kind or 'module'} tower that is known here; known: {', '.join(CONTAINERS)}"
        )
    pairs = container.places[kind].projector
    tensors = projector_tensors(pairs, projector_shapes(tower, d_model))
    keys = {key for key, _ in pairs}
    check_tensors(tensors, {k: s for k, s in folder.shapes().items() if k in keys}, str(path))
    stored_dtypes(tensors, folder)
    return tensors, folder


def fitting(whole: Whole) -> tuple[Container | None, dict[str, list[str]]]:
    """The first container that can hold a model, if any; by container, what does not fit it."""
    wrong = {c.name: c.unfit(whole) for c in ALL}
    return next((c for c in ALL if not wrong[c.name]), None), wrong
