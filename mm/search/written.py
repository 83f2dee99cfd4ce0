"""A plan for people and for programs: a table, JSON, and a layout file that `train` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from rich.table import Table

from mm.config.schema import Config
from mm.predict.step import Prediction
from mm.search.candidate import Candidate
from mm.search.plan import Plan
from mm.search.predictor import Judged

NAMES = (
    "Here homogeneous means the same tp, cp and dp for all modules on the same ranks, N% of the memory the "
    "fastest that needs no more of a device, and GB those of the fullest device."
)


def table(plan: Plan) -> Table:
    """The best few, and the best of each kind, each layout once."""
    out = Table(box=None)
    for head in ("", "s a step", "tokens/s a device", "TFLOPS", "GB", "idle", "boundary", "placement"):
        out.add_column(head, justify="left" if head in ("", "placement") else "right", no_wrap=True)
    for names, judged in named(plan):
        found = judged.prediction
        assert found is not None
        out.add_row(
            names[0],
            f"{found.step_s:.4g}",
            f"{found.tokens_per_s_per_device:.4g}",
            f"{found.tflops_per_device:.4g}",
            f"{judged.bytes / 1e9:.3g}",
            f"{found.bubble_fraction:.1%}",
            f"{found.boundary_s:.3g} s",
            judged.candidate.placement,
        )
    return out


def named(plan: Plan) -> list[tuple[list[str], Judged]]:
    """What was found, each layout once, with its names: its number, and all that it is the best of."""
    rows = [(f"{i}", judged) for i, judged in enumerate(plan.best, 1)]
    rows += [(name, judged) for name, judged in plan.of.items() if name != "best" and judged is not None]
    out: dict[Candidate, tuple[list[str], Judged]] = {}
    for name, judged in rows:
        out.setdefault(judged.candidate, ([], judged))[0].append(name)
    return list(out.values())


def summary(plan: Plan) -> list[str]:
    """What was found and what is proved, in sentences."""
    out = []
    for (name, *also), judged in named(plan):
        out.append(f"{name}: {judged.candidate.describe()}")
        if also:
            out.append(f"   It is the best of these too: {', '.join(also)}.")
    out += [NAMES, *sentences(plan)]
    out += ["frontier of time and memory:"]
    names = {judged.candidate: found[0] for found, judged in named(plan)}
    out += [f"  {j.step_s:.4g} s, {j.bytes / 1e9:.3g} GB: {names[j.candidate]}" for j in plan.frontier]
    return out


def sentences(plan: Plan) -> list[str]:
    """What the table of layouts does not say: the gain, what polishing has done, what is proved."""
    if plan.best[0].candidate.homogeneous:
        out = ["The best is homogeneous: nothing that was found with layouts of modules' own is faster."]
    elif plan.gain is not None:
        out = [f"The best is {plan.gain:.3f} times as fast as the best homogeneous layout."]
    else:
        out = ["No homogeneous layout fits, or none was found in time."]
    out += [line for line in (unsearched_line(plan, names, judged) for names, judged in named(plan)) if line]
    out.append(
        f"{plan.considered:,} candidates: {plan.predicted} predicted in full, the others bounded, in "
        f"{plan.seconds:.0f} processor seconds; {plan.polished} more predicted to polish the best."
    )
    return [*out, *proof_lines(plan), f"samples: {plan.note}"]


def unsearched_line(plan: Plan, names: Sequence[str], judged: Judged) -> str | None:
    """Which choices of a layout are beside the searched space, and what they give; None where none is."""
    if not judged.candidate.unsearched:
        return None
    before = plan.searched["best" if names[0].isdecimal() else names[0]]
    gain = ""
    if before and judged.step_s < before[0].step_s:
        gain = f": {before[0].step_s / judged.step_s - 1:.2%} faster than the best found in it"
    return f"{names[0]}: {', '.join(judged.candidate.unsearched)} from beside the searched space{gain}."


def proof_lines(plan: Plan) -> list[str]:
    """What is proved of all goals: those of which the same is known in one sentence."""
    found: dict[str, list[str]] = {}
    open_ = {name: gap for name in plan.proofs if (gap := _unproved(plan, name)) is not None}
    for name in plan.proofs:
        if len(open_) > 1 and name in open_:
            continue
        found.setdefault(_known_of(plan, name), []).append(name)
    out = [f"{', '.join(names)}: {known}" for known, names in found.items()]
    if len(open_) > 1:
        most = ", ".join(f"{name} {_times(gap)}" for name, gap in open_.items())
        out.append(f"Not proved in time; what was left out can be faster than these at most by: {most}.")
    return out


def proof_line(plan: Plan, name: str) -> str:
    """What is proved of a goal."""
    return f"{name}: {_known_of(plan, name)}"


def _unproved(plan: Plan, name: str) -> float | None:
    """The share by which what was left out can be faster, of a goal of which that is all that is known."""
    gap = gaps(plan)[name]
    if plan.proofs[name].proved or not gap or gap <= plan.within:
        return None
    return gap


def _shown(plan: Plan, name: str) -> list[Judged]:
    """What is shown of a goal."""
    return [*plan.best] if name == "best" else [j for j in (plan.of[name],) if j is not None]


def _times(gap: float) -> str:
    """By how much at most, for people."""
    return f"{gap:.1%}" if gap < 1 else f"{1 + gap:.2g} times"


def _known_of(plan: Plan, name: str) -> str:
    proof, found = plan.proofs[name], _shown(plan, name)
    if plan.nearest > 1.0:
        return f"not proved, a bound was {plan.nearest:.3f} times what was predicted."
    why = f"; {plan.missing[name]}" if name in plan.missing else ""
    gap = proof.gap(found)
    if proof.proved and gap is None:
        return f"proved that there is none that fits{why}."
    if proof.proved:
        least = "nothing" if proof.least == math.inf else f"at least {proof.least:.4g} s"
        return f"proved; what was left out takes {least}."
    if gap is None:
        return f"none found in time{why}."
    if gap == 0:
        return "proved; nothing left out is faster."
    if gap == math.inf:
        return "not proved in time; nothing is known of what was left out."
    most = f"nothing left out is faster by more than {_times(gap)}."
    if gap <= plan.within:
        return f"proved as far as asked for (--within {plan.within:g}); {most}"
    return f"not proved in time; {most}"


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
        "polished": plan.polished,
        "proved": plan.proved,
        "within": plan.within,
        "gaps": gaps(plan),
        "proofs": {name: proof_line(plan, name) for name in plan.proofs},
        "seconds": plan.seconds,
        "samples": plan.note,
    }


def gaps(plan: Plan) -> dict[str, float | None]:
    """By goal, the share by which what was left out can be faster at most; None where nothing is known."""
    shown = {name: [j] if j is not None else [] for name, j in plan.of.items()} | {"best": [*plan.best]}
    found = {
        name: None if plan.nearest > 1 else proof.gap(shown[name]) for name, proof in plan.proofs.items()
    }
    return {name: None if gap == math.inf else gap for name, gap in found.items()}


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
        "unsearched": [] if candidate is None else list(candidate.unsearched),
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
