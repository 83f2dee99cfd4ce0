"""What of a config may be different when a run resumes: freely, with a word, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mm.config.flat import flat, is_of, said

# Keys, or sections of them, that change nothing of what is learned. What data there are is compared by what
# was drawn of them (mm/plan/drawn.py), not by their paths.
FREE = (
    *("layout", "elastic", "schedule", "eval", "checkpoint", "stages"),
    *("run.dir", "run.nproc", "run.timeout_s", "run.device", "run.node_size", "run.trace", "run.engine"),
    *("run.tensorboard", "run.wandb", "run.report", "run.unwritable"),
    *("data.train", "data.eval", "data.weights", "data.lengths", "data.made_by", "data.prefetch"),
    *("data.workers", "data.item_timeout_s", "data.remote"),
    *("train.statistics", "train.recompute", "train.offload", "train.shard"),
)
# Keys that a run cannot resume without: weights and moments are of this model, samples of this order.
KEPT = ("model", "run.seed", "train.global_batch", "train.lora", "data.tokenizer")
MOST = 8  # differences that a refusal names


class Change(NamedTuple):
    """A key whose value is different."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {said(self.was)}, now {said(self.now)}"


class _Absent:
    def __repr__(self) -> str:
        return "not there"


ABSENT = _Absent()


def config_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the run that wrote a checkpoint; empty where it has none, as an imported one."""
    config = state.get("config")
    return config if isinstance(config, dict) else {}


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The keys whose values are different in two configs (mm.config.schema.shown), by dotted name."""
    old, new = dict(flat(was)), dict(flat(now))
    keys = [*old, *(key for key in new if key not in old)]
    found = (Change(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys)
    return [c for c in found if c.was != c.now]


def worth_saying(found: list[Change]) -> list[Change]:
    """Those that change how the run goes on, and that it may have."""
    return [c for c in found if not is_of(c.key, FREE) and not is_of(c.key, KEPT)]


def refused(found: list[Change]) -> str:
    """Those that a run cannot resume with, in words; "" where there are none."""
    kept = [str(c) for c in found if is_of(c.key, KEPT)]
    more = f"; and {len(kept) - MOST} more" if len(kept) > MOST else ""
    return "; ".join(kept[:MOST]) + more
