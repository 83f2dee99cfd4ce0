"""A comparison that was never run, with everything in it."""

from __future__ import annotations

from mm.compare.result import (
    ActionSeconds,
    Arrow,
    Bar,
    Bound,
    Comparison,
    Edge,
    Interval,
    Placed,
    RankResult,
    RunResult,
    StepSeconds,
    Timeline,
    Verdict,
)


def comparison(name: str = "disjoint", layouts: int = 3) -> Comparison:
    """Layouts `name` 0, 1, .. of a job of two modules on two ranks, the later the slower."""
    return Comparison(
        runs=[_run(f"{name} {k}", k) for k in range(layouts)],
        command=f"python -m mm compare {name}",
        config_file=f"{name}.yaml",
        world=2,
        rounds=3,
        steps=4,
        host={"processor": name, "memory_bytes": 2**31, "load": 0.5},
        verdict=Verdict([name], [f"{name} 0 is fastest."], [f"Try {name}."]),
    )


def _run(name: str, k: int) -> RunResult:
    return RunResult(
        name=name,
        layout={"llm": {"ranks": "all"}},
        step_s=StepSeconds(0.25 * (k + 1), 0.2 * (k + 1), 0.5 * (k + 1)),
        tokens_per_s=4000 / (k + 1),
        peak_memory_bytes=2**30 + k,
        boundary_bytes_per_step=1024.0,
        losses=[5.0, 4.0, 3.5, 3.25],
        grad_norms_by_module=[{"vision": 1.0, "llm": 2.0}] * 4,
        max_rel_loss_diff=1e-9 * k,
        max_rel_grad_norm_diff=1e-8 * k,
        speedup=1 / (k + 1),
        speedup_interval=Interval(0.9 / (k + 1), 1.1 / (k + 1)) if k else None,
        speedup_verdict="slower" if k else "baseline",
        file=f"{name}.yaml",
        command=f"python -m mm train {name}",
        config=f"run: {name}",
        flops_by_module={"vision": 1e9, "llm": 2e9},
        tflops_per_device=0.01,
        mfu=None if k else 0.5,
        memory_by_kind={"weights": 2**20},
        imbalance={"vision": 1.25},
        boundary={"vision": Edge(1024.0, 0.001)},
        placed={"vision": _placed([0]), "llm": _placed([0, 1])},
        ranks=[_rank(0, name, k), _rank(1, name, k)],
        timeline=_timeline(k),
        bound=Bound("computing", "llm", 0, 0.5, "llm computes."),
    )


def _placed(ranks: list[int]) -> Placed:
    degrees = {d: 1 for d in ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp")}
    places = [{"tp": 0, "cp": 0, "dp": 0, "pp": k} for k in range(len(ranks))]
    return Placed({**degrees, "pp": len(ranks)}, ranks, places, False, "zero1")


def _rank(rank: int, name: str, k: int) -> RankResult:
    actions = [
        ActionSeconds("vision", "forward", 0.05, 0.0, 0.04, 0.001),
        ActionSeconds("llm", "backward", 0.1 * (k + 1), 0.02, None, None),
    ]
    memory = {"weights": 2**20, "gradients": 2**19, "optimizer": 2**21, "activations": 3 * 2**20 * (k + 1)}
    return RankResult(rank, name, actions, 0.01, 0.02, 0.25 * (k + 1), 0.3, 0.4, memory)


def _timeline(k: int) -> Timeline:
    long = 0.1 * (k + 1)
    bars = [
        Bar(0, 0.0, long, "forward", "vision", 0, 0, 1, 0, 0),
        Bar(0, long, 1.5 * long, "backward_weight", "vision", 0, 0, 1, 0, 0),
        Bar(1, long, 2 * long, "forward", "llm", 1, 0, 2, 0, 0),
    ]
    arrows = [Arrow("boundary_forward", "vision", 0, 1, long, 2)]
    return Timeline(3, 2 * long, "1f1b", ["vision", "llm"], [0, 1], bars, arrows)
