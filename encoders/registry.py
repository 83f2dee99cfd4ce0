"""Encoders by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import is_dataclass

from encoders import compat
from encoders.contract import Encoder

_registry: dict[str, type[Encoder]] = {}


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

    Raises ValueError for an unknown name, a module that cannot be imported, and a class that is no Encoder or
    lacks some of its methods.
    """
    if name in _registry:
        return _registry[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, _registry, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_registry))}."
        raise ValueError(f"no encoder named {name!r}; {hint} An encoder of your own is package.module:Class")
    module, _, attribute = name.partition(":")
    compat.repair()  # the plug-in may import packages that import torchvision or torchaudio
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a plug-in may raise anything while it is imported
        raise ValueError(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}; needed: package.module:Class, "
            "importable from the working folder or PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Encoder)):
        raise ValueError(f"{name!r} is not a subclass of encoders.Encoder")
    lacks = sorted(getattr(found, "__abstractmethods__", ()))
    if not is_dataclass(getattr(found, "Config", None)):
        lacks.append("Config (a frozen dataclass of its options)")
    if lacks:
        raise ValueError(f"{name!r} is no whole encoder: it lacks {', '.join(lacks)}")
    return found
