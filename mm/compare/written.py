"""A comparison as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from mm.compare.result import Comparison


def write_json(result: Comparison, path: Path) -> None:
    """Write a comparison; its keys are the fields of mm.compare.result."""
    path.write_text(json.dumps(asdict(result), indent=1))
