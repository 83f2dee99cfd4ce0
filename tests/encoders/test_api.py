"""encoders.api has what authors of encoders need; their page lists all of it and names no other module."""

from __future__ import annotations

import re
from pathlib import Path

from encoders import api

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_an_encoder.md"


def test_the_page_lists_every_name_once() -> None:
    rows = re.findall(r"^\| (`.+?) \| .+ \|$", PAGE.read_text().partition("\n## API\n")[2], re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(api.__all__)


def test_the_page_names_no_other_module() -> None:
    named = set(re.findall(r"\b((?:encoders|parallel|llm|mm)(?:\.(?!md\b)[a-z_]+)+)", PAGE.read_text()))
    assert named == {"encoders.api", "mm.data.index.register_probe"}
