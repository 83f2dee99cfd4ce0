"""The checkpoints of a run: what there is, why it stays, and what may go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mm.checkpoint.course import config_of
from mm.checkpoint.kept import reasons
from mm.config.build import build
from mm.config.schema import CheckpointConfig
from mm.errors import CheckpointError, Refused
from mm.ranks.claim import claimed
from parallel import checkpoint as store

DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp")


def list_text(run: Path, *, sums: bool = False) -> str:
    """A line for each checkpoint of a run. sums: compare the sum of every file too, which reads them all."""
    found = _published(run)
    why = reasons(found, _rules(found))
    newest, lines = found[-1], list[str]()
    for path in found:
        try:
            state = store.sound_state(path, store.verify if sums else store.structure)
            sound = "whole" if sums else "sizes fit"
            layout, metrics = layout_text(config_of(state)), state.get("metrics")
        except store.BadCheckpoint as error:
            if not path.is_dir():
                continue  # a run that goes on has removed it meanwhile
            sound, layout, metrics = f"damaged ({error})", "", None
        stays = ", ".join(why[path]) or "nothing: it goes with the next save"
        pairs = metrics.items() if isinstance(metrics, dict) else ()
        values = ", ".join(f"{k} {v:.4f}" for k, v in pairs if isinstance(v, float))
        parts = [f"{_size(path) / 2**20:.1f} MiB", sound, f"kept as {stays}", values, layout]
        latest = " (latest)" if path == newest else ""
        lines.append(f"{path.name}{latest}: {'; '.join(part for part in parts if part)}")
    lines += [f"{p.name}: {_size(p) / 2**20:.1f} MiB; {what}" for p, what in _others(run)]
    return "\n".join(lines)


def layout_text(config: Mapping[str, Any]) -> str:
    """The layout that a checkpoint was written under, degrees above 1 alone."""
    out = []
    layouts = config.get("layout", {})
    for module, given in layouts.items() if isinstance(layouts, Mapping) else ():
        if isinstance(given, Mapping):
            degrees = [f"{d} {given[d]}" for d in DEGREES if given.get(d, 1) != 1]
            out.append(" ".join([module, *degrees, f"on ranks {given.get('ranks', 'all')}"]))
    return ", ".join(out)


def prune_text(run: Path, changes: Mapping[str, Any], *, remove: bool = False) -> str:
    """What goes of a run's checkpoints by its rules; removes it if asked.

    changes: of the rules, fields of CheckpointConfig. The newest checkpoint that is whole stays in any case,
    and the one that `latest` names. Raises Refused where a run is writing to the folder.
    """
    _published(run)  # before a claim makes the folder
    with claimed([run]) if remove else nullcontext():
        found = _published(run)
        rules = build(CheckpointConfig, {**_rules(found).model_dump(), **changes}, "checkpoint")
        why = reasons(found, rules)
        whole = next((p for p in reversed(found) if not store.verify(p)), None)
        if whole is not None and not why[whole]:
            why[whole] = ["the newest that is whole"]
        named = _named(run, found)
        if named is not None and not why[named]:
            why[named] = [f"named by {store.LATEST}"]
        gone = [p for p in found if not why[p]]
        left = [p for p, _ in _others(run) if p.suffix == ".tmp"]
        lines = [f"{p.name}: stays as {', '.join(why[p])}" for p in found if why[p]]
        word = "removed" if remove else "would go (--yes removes it)"
        lines += [f"{p.name}: {word}, {_size(p) / 2**20:.1f} MiB" for p in (*gone, *left)]
        if remove:
            for path in gone:
                store.remove(path)
            store.remove_leftovers(run)
            if named is None and whole is not None:
                store.write_whole(run / store.LATEST, f"{whole.name}\n")
        return "\n".join(lines)


def _named(run: Path, found: Sequence[Path]) -> Path | None:
    """The checkpoint that `latest` names; None where it names none."""
    try:
        name = (run / store.LATEST).read_text().strip()
    except (OSError, ValueError):
        return None
    return next((p for p in found if p.name == name), None)


def _published(run: Path) -> list[Path]:
    found = store.published(run)
    if not found:
        what = "it has no checkpoints (step-*)" if run.is_dir() else "it is no folder"
        raise CheckpointError(f"{run}: {store.foreign(run) or f'{what}; needed: the folder of a run'}")
    return found


def _rules(found: Sequence[Path]) -> CheckpointConfig:
    """The rules by which the newest checkpoint with a config was saved."""
    for path in reversed(found):
        try:
            given = config_of(store.read_state(path)).get("checkpoint")
            if isinstance(given, dict):
                return build(CheckpointConfig, given, "checkpoint")
        except (store.BadCheckpoint, Refused):
            continue
    return CheckpointConfig(keep=0)


def _others(run: Path) -> list[tuple[Path, str]]:
    """Folders of checkpoints that are none of the run's."""
    aside = [(p, "set aside by a run that began anew") for p in sorted(run.glob("replaced-step-*"))]
    what = "being written or removed, or left by a save that was interrupted"
    return aside + [(p, what) for p in sorted(run.glob("step-*.tmp"))]


def _size(path: Path) -> int:
    try:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(p.lstat().st_size for p in files if p.is_file())
    except FileNotFoundError:  # a run that goes on removes it
        return 0
