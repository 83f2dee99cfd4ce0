"""Errors of decoders, in words."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class MissingPackage(ValueError):
    """A package that reads a format is not installed: the file itself may be whole."""


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Whatever a decoder raises inside becomes a ValueError that says what could not be read.

    Decoders raise errors of many kinds for a damaged file, and they have no class in common.
    """
    try:
        yield
    except Exception as error:
        if type(error) in (ValueError, MissingPackage) and error.__cause__ is None:
            raise
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{what} cannot be decoded ({type(error).__name__}: {cause})") from error


def package(name: str, reads: str) -> Any:
    """An optional package, imported. Raises MissingPackage, which says how to install it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingPackage(
            f"{reads} is read by the package {name}, which is missing ({error}); needed: pip install "
            "polyrank[media]"
        ) from None
