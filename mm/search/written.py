"""A plan for people and for programs: a table, JSON, and a layout file that `train` takes."""

from __future__ import annotations

import math
from typing import Any

import yaml
from rich.table import Table

from mm.config.schema import Config
from mm.predict.step import Prediction
from mm.search.candidate import Candidate
from mm.search.plan import Plan
from mm.search.predictor import Judged


def table(plan: Plan) -> Table:
    """The best few, and the best of each kind."""
    out = Table(box=None)
    for head in ("", "s a step", "tokens/s a device", "TFLOPS", "GB", "idle", "boundary", "placement"):
        out.add_column(head, justify="left" if head in ("", "placement") else "right", no_wrap=True)
    for name, judged in named(plan):
        found = judged.prediction
        assert found is not None
        out.add_row(
            name,
            f"{found.step_s:.4g}",
            f"{found.tokens_per_s_per_device:.4g}",
            f"{found.tflops_per_device:.4g}",
            f"{judged.bytes / 1e9:.3g}",
            f"{found.bubble_fraction:.1%}",
            f"{found.boundary_s:.3g} s",
            judged.candidate.placement,
        )
    return out


def named(plan: Plan) -> list[tuple[str, Judged]]:
    """What was found, each with its name in the table."""
    rows = [(f"{i}", judged) for i, judged in enumerate(plan.best, 1)]
    return rows + [
        (name, judged) for name, judged in plan.of.items() if name != "best" and judged is not None
    ]


def summary(plan: Plan) -> list[str]:
    """What was found and what is proved, in sentences."""
    out = [f"{name}: {judged.candidate.describe()}" for name, judged in named(plan)]
    if plan.gain is not None:
        out.append(f"The best is {plan.gain:.3f} times as fast as the best homogeneous layout.")
    else:
        out.append("No homogeneous layout fits, or none was found in time.")
    out.append(
        f"{plan.considered:,} candidates: {plan.predicted} predicted in full, the others bounded, in "
        f"{plan.seconds:.0f} processor seconds."
    )
    out += [proof_line(plan, name) for name in plan.proofs]
    out += ["frontier of time and memory:"]
    out += [f"  {j.step_s:.4g} s, {j.bytes / 1e9:.3g} GB: {j.candidate.describe()}" for j in plan.frontier]
    out += [f"samples: {plan.note}"]
    return out


def proof_line(plan: Plan, name: str) -> str:
    """What is proved of a goal."""
    proof, found = plan.proofs[name], plan.best[-1] if name == "best" else plan.of[name]
    if plan.nearest > 1.0:
        return f"{name}: not proved, a bound was {plan.nearest:.3f} times what was predicted."
    why = f"; {plan.missing[name]}" if name in plan.missing else ""
    if proof.proved and found is None:
        return f"{name}: proved that there is none that fits{why}."
    if proof.proved:
        least = "nothing" if proof.least == math.inf else f"at least {proof.least:.4g} s"
        return f"{name}: proved; what was left out takes {least}."
    if found is None:
        return f"{name}: none found in time{why}."
    most = found.step_s / proof.least
    if most <= 1:
        return f"{name}: nothing left out is faster."
    return f"{name}: not proved in time; nothing left out is more than {most - 1:.1%} faster."


def as_json(plan: Plan, cfg: Config) -> dict[str, Any]:
    """The contract's JSON, with what is proved beside it."""
    return {
        "candidates": [entry(judged.candidate, judged.prediction, cfg) for judged in plan.best],
        "rejected": [{"layout": r.layout, "why": r.why, "count": r.count} for r in plan.rejected],
        "best_of": {
            name: None if j is None else entry(j.candidate, j.prediction, cfg) for name, j in plan.of.items()
        },
        "frontier": [entry(j.candidate, j.prediction, cfg) for j in plan.frontier],
        "gain": plan.gain,
        "considered": plan.considered,
        "predicted": plan.predicted,
        "proved": plan.proved,
        "proofs": {name: proof_line(plan, name) for name in plan.proofs},
        "seconds": plan.seconds,
        "samples": plan.note,
    }


def entry(candidate: Candidate | None, found: Prediction | None, cfg: Config) -> dict[str, Any]:
    """A candidate with its prediction; without one, what the config itself says."""
    assert found is not None
    layout = cfg.layout if candidate is None else candidate.layout()
    schedule = cfg.schedule.model_dump() if candidate is None else candidate.schedule(cfg)
    return {
        "layout": layout,
        "schedule": schedule,
        "overrides": {} if candidate is None else candidate.overrides(cfg),
        "placement": None if candidate is None else candidate.placement,
        **prediction_json(found),
    }


def prediction_json(found: Prediction) -> dict[str, Any]:
    """The figures of a prediction, by the contract's names."""
    return {
        "step_s": found.step_s,
        "tokens_per_s_per_device": found.tokens_per_s_per_device,
        "tflops_per_device": found.tflops_per_device,
        "paper_tflops_per_device": found.paper_tflops_per_device,
        "peak_memory_bytes": found.peak_memory_bytes,
        "memory_by_kind": dict(found.memory_by_kind),
        "bubble_fraction": found.bubble_fraction,
        "boundary_s": found.boundary_s,
        "breakdown": {".".join(filter(None, key)): s for key, s in found.breakdown.items()},
    }


def layout_file(judged: Judged, cfg: Config, command: str) -> str:
    """The text of a layout file, which compare and train take. command: that made it."""
    candidate = judged.candidate
    head = [f"# {judged.step_s:.4g} s a step and {judged.bytes / 1e9:.3g} GB predicted by", f"# {command}"]
    overrides = candidate.overrides(cfg)
    if overrides:
        typed = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in overrides.items())
        head.append(f"# It needs these overrides beside it: {typed}")
    body = yaml.safe_dump(
        {"layout": candidate.layout(), "schedule": candidate.schedule(cfg)},
        sort_keys=False,
        default_flow_style=None,
    )
    return "\n".join([*head, body])
