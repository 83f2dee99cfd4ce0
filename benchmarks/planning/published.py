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
from mm.predict.hardware import Curve, Hardware, load_hardware
from mm.predict.paper import paper_flops
from mm.predict.step import Prediction, predict, predict_counts
from mm.predict.work import Counts
from mm.report.plan_json import first_step

HARDWARE = "h100"
# Values that a fit tries.
SHARES, ATTENTION, EXPOSED = (
    np.arange(0.62, 0.87, 0.02),
    np.arange(0.28, 0.61, 0.02),
    np.arange(0.2, 1.01, 0.1),
)
STEP = 0.1


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


Fit = tuple[float, float, float]  # shares of the peak of products and attention, exposed share of tp


@dataclass(frozen=True)
class Linear:
    """Seconds of the fitted runs, linear in one over each share and in the exposed share."""

    truth: np.ndarray
    base: np.ndarray
    slopes: np.ndarray
    at: Fit
    alike: np.ndarray  # runs of one model count as one

    @staticmethod
    def of(cases: Sequence[Case]) -> Linear:
        """From one prediction of each run, and one with each figure changed."""
        hardware, engine = load_hardware(HARDWARE), megatron()
        kinds = hardware.kernels
        at = kinds.product.share[-1], kinds.attention.share[-1], engine.overlap.tp
        products = replace(hardware, kernels=replace(kinds, product=_scaled(kinds.product)))
        attention = replace(hardware, kernels=replace(kinds, attention=_scaled(kinds.attention)))
        more = replace(engine, overlap=replace(engine.overlap, tp=at[2] + STEP))

        def seconds(engine: Engine, hardware: Hardware) -> np.ndarray:
            return np.asarray([c.seconds(engine, hardware) for c in cases])

        base, per = seconds(engine, hardware), 1 / (1 - STEP) - 1
        slopes = [(seconds(engine, products) - base) / per * at[0]]
        slopes += [(seconds(engine, attention) - base) / per * at[1]]
        slopes += [(seconds(more, hardware) - base) / STEP]
        alike = np.asarray([sum(c.row.config == d.row.config for d in cases) for c in cases])
        truth = np.asarray([c.row.step_s for c in cases])
        return Linear(truth, base, np.stack(slopes), at, alike)

    def errors(self, fit: Fit) -> np.ndarray:
        """Relative errors under other figures."""
        moved = [1 / fit[0] - 1 / self.at[0], 1 / fit[1] - 1 / self.at[1], fit[2] - self.at[2]]
        found: np.ndarray = (self.base + np.asarray(moved) @ self.slopes) / self.truth - 1
        return found

    def best(self, use: np.ndarray) -> Fit:
        """The figures with the least sum of squared errors over the runs that are used."""
        weight = use / self.alike
        return min(product(SHARES, ATTENTION, EXPOSED), key=lambda fit: float(weight @ self.errors(fit) ** 2))


def _scaled(curve: Curve) -> Curve:
    return replace(curve, share=tuple((1 - STEP) * x for x in curve.share))


def left_out(cases: Sequence[Case]) -> Mapping[str, tuple[Fit, str]]:
    """By fitted run, the figures that all runs of other models give, and its error with them.

    By "none", those that all give.
    """
    linear, out = Linear.of(cases), {}
    for k, case in enumerate(cases):
        fit = linear.best(np.asarray([c.row.config != case.row.config for c in cases]))
        out[case.row.name] = fit, f"{100 * linear.errors(fit)[k]:+.1f}"
    return out | {"none": (linear.best(np.ones(len(cases))), "")}


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
        print(line(case, found[case.row.name], without.get(case.row.name, (None, ""))[1]))
    print("\n| comparison | published ratio | predicted | error, % | winner |\n|---|---|---|---|---|")
    print("\n".join(comparisons(found)))
    print("\n| left out | products | attention | exposed share of tp |\n|---|---|---|---|")
    for name, (fit, _) in without.items():
        print(f"| {name} | {fit[0]:.2f} | {fit[1]:.2f} | {fit[2]:.1f} |")


if __name__ == "__main__":
    main()
