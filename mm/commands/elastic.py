"""The layout of a run that is started on another number of ranks than before: from a file, or planned."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import yaml

from mm.config.schema import Config, from_mapping, load_layout_file, override, resolve, with_layout
from mm.errors import PolyrankError, Refused

PLAN = "plan:"
PLANNED = "elastic-{world}.yaml"  # in the run's folder: what was planned for so many ranks
SECONDS = 20.0  # processor seconds that planning may take: a run waits for it
POLL_S = 0.2


def for_world(cfg: Config, world: int, *, lead: bool, write: bool = True) -> Config:
    """The config of a run on so many ranks, as `elastic` says; itself where that says nothing of them.

    lead: this process plans, where there is something to plan, and writes it into the run's folder; others
    wait for that. write: whether it may be written; where not, every process plans. Raises Refused.
    """
    wanted = cfg.elastic.get(world, cfg.elastic.get("other"))
    if wanted is None:
        return cfg
    if not wanted.startswith(PLAN):
        path = cfg.base / wanted
        try:
            return with_layout(cfg, *load_layout_file(path))
        except Refused as error:
            raise Refused(f"elastic.{world}: {path}: {error}") from error
    path = Path(cfg.run.dir) / PLANNED.format(world=world)
    if lead or not write:
        planned = _read(path) or _planned(cfg, world, wanted.removeprefix(PLAN))
        if write:
            _write(
                path, planned, f"# Planned for {world} ranks ({wanted}); remove this file to plan again.\n"
            )
    else:
        planned = _awaited(path, SECONDS + cfg.run.timeout_s)
    return _with(cfg, planned, path)


def _with(cfg: Config, planned: dict[str, Any], path: Path) -> Config:
    raw = resolve(with_layout(cfg, planned["layout"], planned["schedule"]))
    for key, value in planned.get("overrides", {}).items():
        override(raw, f"{key}={value}")
    try:
        return from_mapping(raw, cfg.base)
    except Refused as error:
        raise Refused(f"{path}: {error}; remove it to plan again") from error


def _planned(cfg: Config, world: int, hardware: str) -> dict[str, Any]:
    """The best layout that is found in time, as plain data."""
    from mm.predict.hardware import load_hardware
    from mm.search.plan import Planner
    from mm.search.predictor import on_nodes

    found = load_hardware(hardware)
    cfg = on_nodes(cfg, world, found)
    print(f"planning a layout of {world} ranks on {found.name} (elastic)", flush=True)
    best = Planner(cfg, world, found, top=1, limit=SECONDS).plan().best[0]
    print(f"planned: {best.step_s:.4g} s a step, {best.bytes / 1e9:.3g} GB", flush=True)
    candidate = best.candidate
    overrides = {key: _as_yaml(value) for key, value in candidate.overrides(cfg).items()}
    return {"layout": candidate.layout(), "schedule": candidate.schedule(cfg), "overrides": overrides}


def _as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _read(path: Path) -> dict[str, Any] | None:
    """What was planned before; None where nothing that can be read was."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(k), dict) for k in ("layout", "schedule"))
    return found if whole else None


def _write(path: Path, planned: dict[str, Any], head: str) -> None:
    if _read(path) is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(head + yaml.safe_dump(planned, sort_keys=False, default_flow_style=None))
    os.replace(partial, path)


def _awaited(path: Path, seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while (found := _read(path)) is None:
        if time.monotonic() > until:
            raise PolyrankError(
                f"no layout has come in {path} within {seconds:g} s; rank 0 plans it (elastic)"
            )
        time.sleep(POLL_S)
    return found
