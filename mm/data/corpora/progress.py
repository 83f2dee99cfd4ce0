"""How far a recipe is, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(things: Sequence[T], what: str) -> Iterator[T]:
    """The things one after another, with a bar on the standard error where that is a terminal."""
    console = Console(stderr=True)
    yield from track(things, what, console=console, transient=True, disable=not console.is_terminal)
