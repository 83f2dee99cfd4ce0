"""What a layout is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Make = Callable[[Any, Sequence[str]], dict[str, Any]]  # (record, names) -> {"segments"} or {"messages"}
TEXTS = ("json", "txt", "text", "caption", "cap", "transcript")  # endings of parts that a text is in


@dataclass(frozen=True)
class Layout:
    """How samples are written.

    name: as a config and an index have it. make: ours of a record and the names of the payloads that come
    with it; raises ValueError with what is wrong. What it makes depends on no name that it does not use.
    texts: endings of the part of a tar that has the record, the first that is there. key: what an index made
    with it depends on.
    """

    name: str
    make: Make
    texts: tuple[str, ...] = TEXTS
    key: str = ""
