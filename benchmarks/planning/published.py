"""Signed errors of predicted against published runs: python -m benchmarks.planning.published.

Prints a line a run, the comparisons of the tested runs, and what leaving each fitted run out would change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.planning.published_rows import FITTED, TESTED, Row
from mm.plan.blueprint import Blueprint, draw_up
from mm.plan.made_up import made_up_index
from mm.plan.step_plan import StepPlan
from mm.predict.count.job import count_job
from mm.predict.engine import Engine, as_megatron, megatron
from mm.predict.hardware import Hardware, load_hardware
from mm.predict.paper import paper_flops
from mm.predict.step import Prediction, predict, predict_counts
from mm.predict.work import Counts
from mm.report.plan_json import first_step

HARDWARE = "h100"
SHARES, EXPOSED = np.arange(0.62, 0.81, 0.01), np.arange(0.2, 1.01, 0.1)  # that a fit tries


@dataclass(frozen=True)
class Case:
    """A published run, planned."""

    row: Row
    blueprint: Blueprint
    plan: StepPlan
    counts: Counts

    @staticmethod
    def of(row: Row) -> Case:
        """The plan of a row."""
        blueprint = draw_up(row.load(), row.devices)
        plan = first_step(blueprint, made_up_index(blueprint))
        return Case(row, blueprint, plan, count_job(blueprint, plan))

    def seconds(self, engine: Engine, hardware: Hardware) -> float:
        """Of a step under other figures."""
        counts = as_megatron(self.blueprint, self.plan, self.counts, engine)
        return predict_counts(self.blueprint, self.plan, counts, hardware).step_s


def error(predicted: float, published: float | None) -> str:
    """In per cent, with its sign."""
    return "" if published is None else f"{100 * (predicted / published - 1):+.1f}"


def line(case: Case, found: Prediction, left_out: str) -> str:
    """A row of the table."""
    row, gib = case.row, found.peak_memory_bytes / 2**30
    flops = paper_flops(case.blueprint, case.plan) or 0.0
    own = flops / row.step_s / row.devices / 1e12
    cells = [row.name, f"{row.step_s:g}", f"{found.step_s:.3g}", error(found.step_s, row.step_s), left_out]
    cells += [f"{row.peak or ''}", f"{gib:.1f}", error(gib, row.peak)]
    cells += [f"{row.tflops or ''}", f"{own:.1f}" if row.tflops else "", f"{found.tflops_per_device:.0f}"]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "run",
    "step, s",
    "predicted",
    "error, %",
    "left out, %",
    "peak, GiB",
    "predicted",
    "error, %",
    "TFLOPS",
    "by the formula",
    "true, predicted",
)


def left_out(cases: Sequence[Case]) -> Mapping[str, tuple[float, float, str]]:
    """By fitted run, the share of the peak and the exposed share of tp messages that all others give, and its
    error with them. Seconds are taken to be linear in both: in one over the share, and in the exposed share."""
    hardware, engine = load_hardware(HARDWARE), megatron()
    shares, exposed = hardware.kernels.product.share, engine.overlap.tp
    faster = replace(hardware.kernels.product, share=tuple(min(1.0, 1.1 * x) for x in shares))
    other = replace(hardware, kernels=replace(hardware.kernels, product=faster))
    more = replace(engine, overlap=replace(engine.overlap, tp=exposed + 0.2))
    base = np.asarray([c.seconds(engine, hardware) for c in cases])
    by_share = (np.asarray([c.seconds(engine, other) for c in cases]) - base) / (1 / 1.1 - 1)
    by_exposed = (np.asarray([c.seconds(more, hardware) for c in cases]) - base) / 0.2
    truth, top = np.asarray([c.row.step_s for c in cases]), shares[-1]
    # The runs of one model and layout count as one.
    same = [sum(c.row.config == d.row.config for d in cases) for c in cases]
    out = {}
    for k, case in enumerate([*cases, None]):
        best = (np.inf, 0.0, 0.0)
        for share, tp in product(SHARES, EXPOSED):
            errors = np.abs((base + by_share * (top / share - 1) + by_exposed * (tp - exposed)) / truth - 1)
            errors = errors / same
            if case is not None:
                errors[[c.row.config == case.row.config for c in cases]] = 0
            best = min(best, (float(errors.sum()), float(share), float(tp)))
        _, share, tp = best
        if case is None:
            out["all"] = (share, tp, "")
            continue
        found = base[k] + by_share[k] * (top / share - 1) + by_exposed[k] * (tp - exposed)
        out[case.row.name] = (share, tp, error(float(found), case.row.step_s))
    return out


def comparisons(found: Mapping[str, Prediction]) -> list[str]:
    """Homogeneous against heterogeneous, published and predicted."""
    lines = []
    for pair in dict.fromkeys(r.pair for r in TESTED):
        one, two = sorted((r for r in TESTED if r.pair == pair), key=lambda r: not r.homogeneous)
        said, ours = one.step_s / two.step_s, found[one.name].step_s / found[two.name].step_s
        winner = "right" if (said > 1) == (ours > 1) else "wrong"
        lines.append(f"| {pair} | {said:.3f} | {ours:.3f} | {error(ours, said)} | {winner} |")
    return lines


def main() -> None:
    """Print everything."""
    hardware = load_hardware(HARDWARE)
    fitted, tested = [Case.of(r) for r in FITTED], [Case.of(r) for r in TESTED]
    without = left_out(fitted)
    found = {c.row.name: predict(c.blueprint, c.plan, hardware) for c in (*fitted, *tested)}
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for case in (*fitted, *tested):
        _, _, least = without.get(case.row.name, (0.0, 0.0, ""))
        print(line(case, found[case.row.name], least))
    print("\n| comparison | published ratio | predicted | error, % | winner |\n|---|---|---|---|---|")
    print("\n".join(comparisons(found)))
    print("\n| left out | share of the peak | exposed share of tp |\n|---|---|---|")
    for name, (share, tp, _) in without.items():
        print(f"| {'none' if name == 'all' else name} | {share:.2f} | {tp:.1f} |")


if __name__ == "__main__":
    main()
