"""One layout's entry in the result: what its blueprint says of it, and what its watched steps have shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mm.compare.observe import Observed, typical
from mm.compare.result import Placed, RankResult, RunResult
from mm.compare.variants import Variant
from mm.config.schema import resolve_yaml
from mm.plan.blueprint import Blueprint
from parallel.schedule.action import COMPUTE
from parallel.topology.layout import Layout

COMPUTING = frozenset(kind.value for kind in COMPUTE)


def described(
    one: RunResult, variant: Variant, blueprint: Blueprint, config: Path, overrides: Sequence[str]
) -> RunResult:
    """An entry with what is known of its layout before it runs. config, overrides: of the command line."""
    return replace(
        one,
        file=str(variant.path),
        command=train_command(config, overrides, variant, blueprint.world),
        config=resolve_yaml(variant.cfg),
        placed={m: placed(blueprint.layouts[m], blueprint.policies[m]) for m in blueprint.modules},
    )


def placed(layout: Layout, policy: str) -> Placed:
    """Where a module is. policy: of its data ranks."""
    return Placed(
        degrees={**layout.degrees, "dp": layout.dp, "edp": layout.edp},
        ranks=list(layout.ranks),
        places=[layout.coord(r)._asdict() for r in layout.ranks],
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        data_parallel=policy,
    )


def train_command(config: Path, overrides: Sequence[str], variant: Variant, world: int) -> str:
    """The command that trains under a layout, on local ranks."""
    changes = [f"layout={flow(variant.layout)}"]
    changes += [f"schedule.{key}={flow(value)}" for key, value in variant.schedule.items()]
    return shlex.join(["python", "-m", "mm", "train", str(config), *overrides, *changes, f"--nproc={world}"])


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, sort_keys=False)
    return text.removesuffix("...\n").strip()


def rated(one: RunResult, world: int, peak: float | None) -> RunResult:
    """An entry with its FLOPs by time. world: ranks of the comparison; peak: TFLOPS of a device."""
    rates = {m: flops / one.step_s.median / world / 1e12 for m, flops in one.flops_by_module.items()}
    return replace(
        one,
        tflops_per_device=sum(rates.values()),
        tflops_per_device_by_module=rates,
        mfu=None if peak is None else sum(rates.values()) / peak,
    )


def watched(one: RunResult, observed: Sequence[Observed], memory: Sequence[Mapping[str, int]]) -> RunResult:
    """An entry with what its watched steps have shown. memory: by rank."""
    step = typical(observed, memory)
    busy = {m: sum(busy_seconds(rank, m) for rank in step.ranks) for m in step.flops}
    fullest = max(step.ranks, key=lambda rank: sum(rank.memory.values()))
    return replace(
        one,
        tflops_while_busy={m: step.flops[m] / s / 1e12 if s else 0.0 for m, s in busy.items()},
        memory_by_kind=fullest.memory,
        fullest_rank=fullest.rank,
        ranks=step.ranks,
        timeline=step.timeline,
    )


def busy_seconds(rank: RankResult, module: str) -> float:
    """Seconds of a rank in a module's computations, exchanges in them included, waiting for inputs not."""
    found = [a for a in rank.actions if a.module == module and a.kind in COMPUTING]
    return sum(a.seconds - a.waited for a in found)
