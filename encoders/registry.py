"""Encoders by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from typing import Any

from encoders import compat
from encoders.contract import Encoder

_registry: dict[str, type[Encoder]] = {}
GROUP = "polyrank.encoders"  # of entry points
FOLDER = "hf:"  # before the folder of a transformers model


def register(name: str) -> Callable[[type[Encoder]], type[Encoder]]:
    """Class decorator: `name` in a config means this encoder. Raises ValueError if the name is taken."""

    def add(cls: type[Encoder]) -> type[Encoder]:
        if _registry.get(name, cls) is not cls:
            raise ValueError(f"an encoder named {name!r} exists already: {_registry[name].__qualname__}")
        _registry[name] = cls
        return cls

    return add


def resolve(name: str) -> type[Encoder]:
    """The encoder that is registered as `name`, or the class at `package.module:Class`.

    A name may also be that of an entry point of the group polyrank.encoders, which any installed package may
    have, and hf:FOLDER, for a class of the transformers package. Raises ValueError for an unknown name, a
    module that cannot be imported, and a class that is no Encoder or lacks some of its methods.
    """
    if name in _registry:
        return _registry[name]
    if name.startswith(FOLDER):
        return _registry[FOLDER.removesuffix(":")]
    if ":" in name:
        return _checked(name, _imported(name, "importable from the working folder or PYTHONPATH"))
    plugins = {point.name: point for point in entry_points(group=GROUP)}
    if name in plugins:
        where = f"the entry point {plugins[name].value!r} of an installed package"
        return _checked(name, _imported(plugins[name].value, where))
    known = sorted({*_registry, *plugins} - {FOLDER.removesuffix(":")})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
    raise ValueError(
        f"no encoder named {name!r}; {hint} An encoder of your own is package.module:Class, one of the "
        "transformers package hf:FOLDER"
    )


def implied_options(name: str) -> dict[str, str]:
    """The options that an encoder's name gives: the folder of hf:FOLDER."""
    return {"folder": name.removeprefix(FOLDER)} if name.startswith(FOLDER) else {}


def _imported(path: str, where: str) -> Any:
    """What is at package.module:Class."""
    module, _, attribute = path.partition(":")
    compat.repair()  # the plug-in may import packages that import torchvision or torchaudio
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plug-in may raise anything while it is imported
        raise ValueError(
            f"{path!r} cannot be imported: {type(error).__name__}: {error}; needed: package.module:Class, "
            f"{where}"
        ) from error


def _checked(name: str, found: Any) -> type[Encoder]:
    if not (isinstance(found, type) and issubclass(found, Encoder)):
        raise ValueError(f"{name!r} is not a subclass of encoders.Encoder")
    lacks = sorted(getattr(found, "__abstractmethods__", ()))
    if not is_dataclass(getattr(found, "Config", None)):
        lacks.append("Config (a frozen dataclass of its options)")
    if lacks:
        raise ValueError(f"{name!r} is no whole encoder: it lacks {', '.join(lacks)}")
    return found
