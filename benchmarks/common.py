"""What benchmarks share. They run from the root of the checkout: `python -m benchmarks.SUBJECT.NAME`."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the module's docstring as it stands, commands included."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def release(version: str) -> str:
    """A version without its local part: there megatron-core appends the commit of the working folder."""
    return version.split("+")[0]
