"""What would fit in the place of a layout that does not: the nearest changes, each predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm.recompute import recompute_parts
from mm.config.advice import get, with_changes
from mm.config.outline import SINK, llm_config, recomputable
from mm.config.schema import Config
from mm.errors import Refused
from mm.predict.hardware import Hardware
from mm.predict.step import shortfall
from mm.search.predictor import Predictor, on_nodes
from parallel.topology.layout import parse_ranks, typed

MOST = 16  # times as many devices, at most
SHOWN = 3  # changes that are told

Changes = Mapping[str, Any]  # by dotted key


class Fitting(NamedTuple):
    """A change with which a step fits. change: as it is typed. bytes: of the fullest rank."""

    change: str
    step_s: float
    bytes: float


def would_fit(cfg: Config, world: int, hardware: Hardware) -> list[Fitting]:
    """What fits in the place of a config that does not: the fastest single changes; where none fits, changes
    together; and the fewest devices, as they are or with the changes that save most."""
    predictor = Predictor(cfg, world, hardware)

    def found(options: Sequence[Changes]) -> list[Fitting]:
        every = [_fitting(predictor, cfg, changes) for changes in options]
        return sorted((f for f in every if f is not None), key=lambda f: f.step_s)[:SHOWN]

    together = list(_together(cfg))
    return (found(list(_single(cfg))) or found(together)) + _on_more(
        cfg, world, hardware, [{}, *together[-1:]]
    )


def fitting_lines(found: Sequence[Fitting]) -> list[str]:
    """The same for people."""
    if not found:
        return [
            f"of what was tried nothing fits, up to {MOST} times as many devices; search: without --layout"
        ]
    return [f"would fit: {f.change}: {f.step_s:.4g} s, {f.bytes / 1e9:.3g} GB" for f in found]


def _fitting(predictor: Predictor, cfg: Config, changes: Changes, also: str = "") -> Fitting | None:
    try:
        found = predictor.of_config(with_changes(cfg, changes))
    except (Refused, ValueError):
        return None
    if shortfall(found, predictor.hardware) is not None:
        return None
    return Fitting(" ".join(filter(None, (also, typed(changes)))), found.step_s, found.peak_memory_bytes)


def _single(cfg: Config) -> Iterator[Changes]:
    """One thing that takes less memory: more computed again, more ranks that share weights, larger degrees,
    smaller micro-batches."""
    for parts in _more_again(cfg):
        yield {"train.recompute": parts}
    for m in (*cfg.model, SINK):
        if get(cfg, f"layout.{m}.data_parallel", "auto") != "zero3":
            yield {f"layout.{m}.data_parallel": "zero3"}
    for m in (*cfg.model, SINK):
        for axis in ("tp", "cp", "pp", "ep"):
            yield _doubled(cfg, m, axis)
    for factor in (2, 4):
        yield _smaller(cfg, factor)


def _together(cfg: Config) -> Iterator[Changes]:
    """Several of these, the most last."""
    zero3 = {f"layout.{m}.data_parallel": "zero3" for m in (*cfg.model, SINK)}
    again = {"train.recompute": True}
    yield {**again, **zero3}
    ep = int(get(cfg, f"layout.{SINK}.ep", 1))
    for factor in (4, 16):
        yield {**zero3, f"layout.{SINK}.ep": factor * ep}
        yield {**again, **zero3, f"layout.{SINK}.ep": factor * ep}
    for factor in (2, 4, 8):
        yield {**again, **zero3, **_smaller(cfg, factor)}
        yield {**again, **zero3, **_smaller(cfg, factor), **_doubled(cfg, SINK, "tp")}
        yield {**again, **zero3, **_smaller(cfg, factor), **_doubled(cfg, SINK, "pp")}
    yield {**again, **zero3}


def _more_again(cfg: Config) -> Iterator[bool | list[str]]:
    """Values of train.recompute with which more is computed again than now."""
    now = cfg.train.recompute
    if isinstance(now, dict):
        if any(now.get(m) is not True for m in (*cfg.model, SINK)):
            yield True
        return
    parts = recompute_parts(now)
    if "full" in parts:
        return
    if not parts:
        yield ["norm"]
    selected = recomputable(llm_config(cfg)) - {"full"}
    if not parts >= selected:
        yield sorted(selected)
    yield True


def _doubled(cfg: Config, module: str, axis: str) -> Changes:
    key = f"layout.{module}.{axis}"
    more = {f"layout.{module}.sequence_parallel": True} if axis == "tp" else {}
    return {key: 2 * int(get(cfg, key, 1)), **more}


def _smaller(cfg: Config, factor: int) -> Changes:
    """Micro-batches of that part of the size; bounds of another number of them go."""
    m = factor * cfg.schedule.microbatches
    return {"schedule.microbatches": min(m, cfg.train.global_batch)}


def _on_more(cfg: Config, world: int, hardware: Hardware, options: Sequence[Changes]) -> list[Fitting]:
    """The fewest devices on which it fits: twice as many, four times .., each module on as large a share."""
    factor = 2
    while factor <= MOST:
        try:
            grown = on_nodes(with_changes(cfg, _spread(cfg, world, factor)), factor * world, hardware)
        except (Refused, ValueError):
            return []
        predictor = Predictor(grown, factor * world, hardware)
        for changes in options:
            found = _fitting(predictor, grown, changes, f"--devices {factor * world}")
            if found is not None:
                return [found]
        factor *= 2
    return []


def _spread(cfg: Config, world: int, factor: int) -> Changes:
    """The ranks of modules that are not on all, so many times as many."""
    out = {}
    for m in (*cfg.model, SINK):
        spec = get(cfg, f"layout.{m}.ranks", "all")
        if spec != "all":
            ranks = parse_ranks(spec, world, m)
            out[f"layout.{m}.ranks"] = f"{factor * ranks[0]}-{factor * (ranks[-1] + 1) - 1}"
    return out
