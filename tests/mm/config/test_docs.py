"""docs/config.md lists every key of the config, with its default and its description."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from mm.config.build import Section
from mm.config.schema import Config, EncoderConfig
from mm.config.sources import LengthsConfig, SourceConfig, WeightsConfig
from mm.config.synthetic import SyntheticConfig, SyntheticItems
from mm.config.training import SpikeConfig

LISTS: dict[str, type[Section]] = {
    "data.train": SourceConfig,
    "data.weights": WeightsConfig,
    "data.lengths": LengthsConfig,
}
INSIDE: dict[str, type[Section]] = {
    "data.synthetic": SyntheticConfig,
    "data.synthetic.items": SyntheticItems,
    "train.spike": SpikeConfig,
}
PAGE = Path(__file__).resolve().parents[3] / "docs" / "config.md"


def fields(kind: type[Section], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted keys of a section with what the schema says of them; X is any encoder's module."""
    for name, field in kind.model_fields.items():
        key = f"{path}.{name}" if path else name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, key)
        elif key in LISTS:
            yield key, field
            yield from fields(LISTS[key], f"{key}.K")
        elif key in INSIDE:
            yield key, field
            yield from fields(INSIDE[key], f"{key}.X" if key.endswith("items") else key)
        elif key == "model":
            yield from fields(EncoderConfig, "model.X")
        elif key != "base":
            yield "model.llm" if key == "llm" else key, field


def rows() -> dict[str, tuple[Any, str]]:
    """By key, the default and the meaning that the page gives; without marks of markdown."""
    found = re.findall(r"^\| `([\w.]+)` \|(.*?)\| (.*) \|$", PAGE.read_text(), re.M)
    plain = ((key, default.replace("`", ""), text.replace("`", "")) for key, default, text in found)
    return {
        key: (yaml.safe_load(default), re.sub(r" \(\[.*?\]\(.*?\)\)", "", text))
        for key, default, text in plain
        if "." in key or key in ("layout", "elastic", "stages")
    }


def given(field: FieldInfo) -> Any:
    """A default as YAML has it; None where there is none, or nothing in it."""
    if field.is_required() or field.default in ({}, []):
        return None
    return list(field.default) if isinstance(field.default, tuple) else field.default


def test_the_page_lists_every_key_with_its_default_and_meaning() -> None:
    schema, page = dict(fields(Config)), rows()
    assert list(page.keys() ^ schema.keys()) == []
    for key, field in schema.items():
        default, text = page[key]
        assert field.description and text.startswith(field.description), key
        expected = given(field)
        assert (float(default) if isinstance(expected, float) else default) == expected, key
