"""A config as dotted keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def flat(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, by dotted key. Tuples become lists, as in JSON."""
    for name, value in section.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from flat(value, key)
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def is_of(key: str, sections: Collection[str]) -> bool:
    """Whether a dotted key is one of some keys, or in one of some sections."""
    return any(key == s or key.startswith(f"{s}.") for s in sections)


def said(value: Any) -> str:
    """A value of a config in a message."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    return text if len(text) <= 60 else f"{text[:58]}.."
