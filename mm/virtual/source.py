"""Which line of the project a call comes from."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("parallel", "encoders", "llm", "mm"))
OWN = f"{Path(__file__).parent}/"
FSDP = "torch/distributed/fsdp/_fully_shard/"


class Site(NamedTuple):
    """A line of the code. fsdp: the innermost function of FSDP that is at work there, "" where none is."""

    file: str  # from the folder that the packages are in; of other code its whole path
    line: int
    fsdp: str


@cache
def _place(path: str) -> tuple[str, bool, bool]:
    """(file as it is shown, whether it is the project's, whether it is FSDP's)."""
    if path.startswith(PACKAGES) and not path.startswith(OWN):
        return path[len(str(ROOT)) + 1 :], True, False
    return path, False, FSDP in path


def site() -> Site:
    """The innermost line of the project on the stack; of a plug-in or a library where there is none."""
    frame: FrameType | None = sys._getframe(1)
    fsdp, outside = "", None
    while frame is not None:
        path = frame.f_code.co_filename
        shown, ours, of_fsdp = _place(path)
        if ours:
            return Site(shown, frame.f_lineno, fsdp)
        if of_fsdp and not fsdp and not frame.f_code.co_name.startswith("<"):
            fsdp = frame.f_code.co_name
        if outside is None and "/torch/" not in path and not path.startswith(OWN):
            outside = frame
        frame = frame.f_back
    if outside is None:
        return Site("", 0, fsdp)
    return Site(outside.f_code.co_filename, outside.f_lineno, fsdp)
