"""Whether a checkpoint is as it was written, and may be trained on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mm.checkpoint.finite import first_of, not_finite
from mm.errors import CheckpointError, NonFinite
from parallel import checkpoint as store
from parallel.sharding.optim import RULES


def verify_text(path: Path) -> str:
    """A line that a checkpoint is undamaged and finite; one process, which holds a tensor at a time.

    Raises CheckpointError naming every damaged file, and NonFinite where no run can go on from it: a tensor
    has NaN, or one that is trained has infinities. Others that have some may be masks: the line names them.
    """
    try:
        store.sound_state(path, store.verify)
        opened = store.Opened(path)
        maybe = masks(opened.shapes)
        broken, infinite = list[str](), list[str]()
        for name in sorted(opened.shapes):
            pair = [(name, opened.read([name])[name])]
            if not_finite(pair, maybe):
                broken.append(name)
            elif not_finite(pair, ()):
                infinite.append(name)
    except store.BadCheckpoint as error:
        raise CheckpointError(f"{path}: {error}") from error
    if broken:
        raise NonFinite(
            f"{path}: its files are whole, and {len(broken)} of {len(opened.shapes)} tensors are not finite: "
            f"{first_of(broken)}. A run passes over it; needed: an older checkpoint"
        )
    more = f"; infinities in {first_of(infinite)}, which may be masks" if infinite else ""
    return f"{path}: whole{more}"


def masks(names: Collection[str]) -> set[str]:
    """The tensors of a checkpoint that may hold infinities: those without optimizer state, if any has it."""
    parts = {name: name.split(".") for name in names}
    state = {name for name, p in parts.items() if len(p) > 3 and p[1] in RULES}
    trained = {".".join([p[0], *p[2:-1]]) for name, p in parts.items() if name in state}
    return {*names} - state - trained if state else set()
