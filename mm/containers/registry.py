"""Which containers there are, by model_type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoders.hf.folder import kind_of
from encoders.hf.write import written
from mm.containers.card import CARD, PROJECTOR, level_key, level_of, modules_of_card, read_card
from mm.containers.container import Container, Pairs, Tower, Whole
from mm.containers.flamingo import FLAMINGO
from mm.containers.llava import LLAVA
from mm.containers.omni import OMNI
from mm.containers.write import projector_shapes, projector_tensors
from parallel.published import FileTensor, SafeFolder, check_tensors, stored_dtypes

# In the order in which they are tried.
ALL = (LLAVA, FLAMINGO, OMNI)
CONTAINERS: dict[str, Container] = {c.name: c for c in ALL}


def container_of(folder: SafeFolder) -> Container | None:
    """The container that a folder's config.json names; None for a folder of one module."""
    return CONTAINERS.get(str(folder.config().get("model_type")))


def is_whole(path: Path) -> bool:
    """Whether a folder holds a whole model: a container, or modules with a card."""
    return (path / CARD).is_file() or container_of(SafeFolder(path)) is not None


def modules_of(path: Path) -> dict[str, dict[str, Any]]:
    """The encoder modules of a whole model's folder, as a config names them, with its weights.

    Raises ValueError where the folder is of no known container, and for what ours cannot be.
    """
    folder, card = SafeFolder(path), read_card(path)
    if card is not None:
        return modules_of_card(path, card)
    container = container_of(folder)
    if container is None:
        raise ValueError(
            f"{path} is of model_type {folder.config().get('model_type')}, which is no whole model that is "
            f"known here; known: {', '.join(CONTAINERS)}. A language model alone is model.llm.preset, an "
            "encoder alone model.<module>.weights"
        )
    out = {}
    for name, module in container.modules(folder).items():
        projector = dict(module["projector"])
        if projector["kind"] != "none":
            projector["weights"] = str(path)
        out[name] = {**module, "weights": str(path), "projector": projector}
    return out


def options_of(path: Path) -> dict[str, Any]:
    """The options of the language model in a whole model's folder that its own config.json does not say."""
    folder, card = SafeFolder(path), read_card(path)
    if card is not None:
        return {"level_layers": card["level_layers"]} if card.get("level_layers") else {}
    container = container_of(folder)
    return {} if container is None else container.options(folder)


def projector_of(
    path: str | Path, name: str, tower: Tower, d_model: int, level: int = 0
) -> tuple[list[FileTensor], SafeFolder]:
    """The tensors of the projector of module `name` in a whole model's folder; of a level of its features.

    Raises ValueError where the folder is of no known container or has no such module, and where tensors are
    missing or of another shape.
    """
    shapes = projector_shapes(tower, d_model)
    if read_card(Path(path)) is not None:
        folder = SafeFolder(Path(path) / name / PROJECTOR)
        before = level_key(level)
        pairs: Pairs = [(before + n, n) for n in shapes]
        tensors = projector_tensors(pairs, shapes)
        given = {k: s for k, s in folder.shapes().items() if level_of(k) == level}
    else:
        folder = SafeFolder(path)
        container, kind = container_of(folder), kind_of(tower.cls)
        if container is None or kind not in container.places:
            raise ValueError(
                f"{path} is of model_type {folder.config().get('model_type')}, which has no projector of a "
                f"{kind or name} tower that is known here; known: {', '.join(CONTAINERS)}"
            )
        pairs = container.places[kind].projector
        lacking = sorted(shapes.keys() - {ours for _, ours in pairs})
        if lacking:
            raise ValueError(
                f"model.{name}.projector has {', '.join(lacking)}, which that of a {container.title} folder "
                f"has not; needed: {container.hint}"
            )
        tensors, keys = projector_tensors(pairs, shapes), {key for key, _ in pairs}
        given = {k: s for k, s in folder.shapes().items() if k in keys}
    check_tensors(tensors, given, str(folder.path))
    stored_dtypes(tensors, folder)
    return tensors, folder


def fitting(whole: Whole) -> tuple[Container | None, dict[str, list[str]]]:
    """The first container that can hold a model, if any; by title of each other, what does not fit it."""
    wrong: dict[str, list[str]] = {}
    for container in ALL:
        found = misfits(container, whole)
        if not found:
            return container, wrong
        wrong[container.title] = found
    return None, wrong


def misfits(container: Container, whole: Whole) -> list[str]:
    """What of a model a container cannot hold, option by option."""
    found = container.unfit(whole)
    if not found:
        for name, tower in whole.towers.items():
            try:
                written(tower.cls, tower.cfg)
            except ValueError as error:
                found.append(f"model.{name}.options: {error}")
    return found
