"""What the files of a run say, read without trust: a line that is damaged is named and left out."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mm.data.remote.urls import scrub
from mm.errors import Refused
from mm.report.starts import STARTS

METRICS, SKIPPED, PLAN, CONFIG, LOG = "metrics.jsonl", "skipped.jsonl", "plan.json", "config.yaml", "log.txt"
LAST_ONLY = ("drawn_by_source",)  # counts so far: the last line has them all
LEFT_OUT = ("layers", "step")
LARGEST = 16 << 20  # bytes of one file that is shown as a whole


class Damage(NamedTuple):
    """What cannot be read. line: its number from 1, None where it is the whole file."""

    file: str
    line: int | None
    why: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f', line {self.line}'}: {self.why}"


@dataclass
class Series:
    """Values of one metric over steps, in the order of the file."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))


@dataclass
class RunFiles:
    """What the files of a run say. All of it may be anybody's text.

    last_step: the largest number of a step. series: by path in a line of metrics.jsonl, such as ("loss",) or
    ("boundary", "vision", "bytes"). last: the last counts of LAST_ONLY. pictures: files of drawn steps.
    """

    folder: Path
    last_step: float = 0
    series: dict[tuple[str, ...], Series] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    log: str = ""
    pictures: list[Path] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)

    def of(self, *path: str) -> Series:
        """A series, empty where the run has none."""
        return self.series.get(path, Series())

    def under(self, first: str, *rest: str) -> dict[str, Series]:
        """By name, the series (first, name, *rest)."""
        n = 2 + len(rest)
        return {p[1]: s for p, s in self.series.items() if len(p) == n and p[0] == first and p[2:] == rest}


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder. Raises Refused where it is none; what is damaged in it is in `damaged`."""
    if not any((folder / name).is_file() for name in (METRICS, CONFIG)):
        raise Refused(
            f"{folder} has neither {METRICS} nor {CONFIG}; needed: the folder of a run, such as its run.dir"
        )
    run = RunFiles(folder)
    for k, record in _lines(run, METRICS):
        _take(run, k, record)
    run.skipped = [record for _, record in _lines(run, SKIPPED)]
    run.starts = [record for _, record in _lines(run, STARTS)]
    run.plan = _mapping(run, PLAN, json.loads)
    run.config_text = scrub(_text(run, CONFIG))
    run.config = _mapping(run, CONFIG, yaml.safe_load)
    run.log = scrub(_text(run, LOG))
    run.pictures = sorted((p for p in folder.glob("schedule*.svg") if p.is_file()), key=_picture_order)
    return run


def _picture_order(path: Path) -> tuple[int, str]:
    step = path.stem.rpartition("-")[2]
    return (int(step) if step.isascii() and step.isdigit() and len(step) < 18 else 0, path.name)


def _lines(run: RunFiles, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines with their lines' numbers, one at a time; the rest is damage."""
    path = run.folder / name
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for k, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    torn = "" if line.endswith("\n") else ", and the file ends in it"
                    run.damaged.append(Damage(name, k, f"not JSON{torn} ({str(error)[:80]})"))
                    continue
                if isinstance(found, dict):
                    yield k, found
                else:
                    run.damaged.append(Damage(name, k, "not an object"))
    except OSError as error:
        run.damaged.append(Damage(name, None, error.strerror or str(error)))


def _text(run: RunFiles, name: str) -> str:
    """A file's text, or the end of one that is too large; "" where it cannot be read."""
    path = run.folder / name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(0, size - LARGEST))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.damaged.append(Damage(name, None, error.strerror or str(error)))
        return ""


def _mapping(run: RunFiles, name: str, parse: Callable[[str], object]) -> dict[str, Any]:
    text = _text(run, name)
    if not text:
        return {}
    try:
        found = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        run.damaged.append(Damage(name, None, str(error).splitlines()[0][:120]))
        return {}
    if isinstance(found, dict):
        return found
    run.damaged.append(Damage(name, None, "not a mapping"))
    return {}


def _take(run: RunFiles, line: int, record: dict[str, Any]) -> None:
    """A line of metrics.jsonl: each of its numbers goes to its series."""
    step = as_number(record.get("step"))
    if step is None or not math.isfinite(step):
        run.damaged.append(Damage(METRICS, line, "without a step"))
        return
    if "eval_loss" not in record:
        run.last_step = max(run.last_step, step)
    for key, value in record.items():
        if key in LAST_ONLY and isinstance(value, dict):
            run.last[key] = value
        elif key not in LEFT_OUT:
            for path, found in _numbers((key,), value):
                series = run.series.setdefault(path, Series())
                series.steps.append(step)
                series.values.append(found)


def _numbers(path: tuple[str, ...], value: object) -> Iterator[tuple[tuple[str, ...], float]]:
    found = as_number(value)
    if found is not None:
        yield path, found
    elif isinstance(value, Mapping) and len(path) < 4:
        for key, inner in value.items():
            yield from _numbers((*path, str(key)), inner)


def as_number(value: object) -> float | None:
    """A number of JSON as a float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
