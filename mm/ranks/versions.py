"""What runs on this rank: packages by version, our sources and plug-ins by digest."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import mm
from mm.config.schema import Config

OURS = ("parallel", "encoders", "llm", "mm")
THEIRS = ("torch", "numpy", "transformers", "tokenizers")  # that results may depend on
ROOT = Path(mm.__file__).parents[1]


def versions(configs: Iterable[Config]) -> dict[str, str]:
    """By name, the version of Python and of packages, and a digest of the sources of ours and of plug-ins."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found |= {name: _version(name) for name in THEIRS}
    found |= {f"sources of {name}": digest(sorted((ROOT / name).rglob("*.py"))) for name in OURS}
    named = {e.encoder.partition(":")[0] for cfg in configs for e in cfg.model.values() if ":" in e.encoder}
    for name in sorted(named - {"hf"}):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found[f"sources of {name}"] = digest([Path(spec.origin)])
    return found


def digest(files: Iterable[Path]) -> str:
    """Of the contents of files, and of their names in their folders."""
    what = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        what.update(f"{file.parent.name}/{file.name} {len(data)}\n".encode() + data)
    return what.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
