"""What a run is, for people: said at its start and by a dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mm.data.inspect import count_lines
from mm.data.sample import Index
from mm.plan.blueprint import Blueprint, bare_module, elements_per_rank
from mm.ranks.memory import device_memory
from parallel.topology.axis import Axes


def header(blueprint: Blueprint, indexes: Mapping[str, Index], device: str, backend: str) -> str:
    """Run folder, ranks, schedule, each module's parameters and layout, and what is read of each data set.

    indexes: by data set; device, backend: of the ranks and of their messages.
    """
    cfg = blueprint.cfg
    train, counts = cfg.train, parameter_counts(blueprint)
    stored = str(blueprint.stored_dtype).removeprefix("torch.")
    kept = "" if stored == train.dtype else f", weights in {stored}"
    n = cfg.schedule.microbatches
    schedule = blueprint.schedule([set(cfg.model)] * n).kind
    lines = [
        f"run       {cfg.run.dir}",
        f"steps     {train.steps} of {train.global_batch} samples in {train.dtype}{kept}",
        f"ranks     {blueprint.world} on {device}, messages by {backend}",
        f"schedule  {schedule}, {n} micro-batch{'es' if n > 1 else ''} a step",
    ]
    rows: list[tuple[str, ...]] = [("module", "trained", "frozen", "ranks", "layout")]
    for m in blueprint.modules:
        layout = blueprint.layouts[m]
        trained, frozen = counts[m]
        rows.append((m, f"{trained:,}", f"{frozen:,}", ranks_text(layout.ranks), layout.describe()))
    every = [sum(n) for n in zip(*counts.values(), strict=True)]
    rows.append(("all", *(f"{n:,}" for n in every), "", ""))
    learn = {"training": list(blueprint.inputs.encoders)}
    data = [line for name, i in indexes.items() for line in count_lines(name, i, learn.get(name, ()))]
    return "\n".join([*lines, *_aligned(rows), *data])


def parameter_counts(blueprint: Blueprint) -> dict[str, tuple[int, int]]:
    """By module, parameters of the whole model that are trained, and that are frozen."""
    out = {}
    for m in blueprint.modules:
        # By name: the first and the last stage may both hold an embedding.
        found = {
            name: p
            for stage in blueprint.stages[m]
            for name, p in bare_module(blueprint, m, Axes(), stage).named_parameters()
        }
        sizes: Counter[bool] = Counter()
        for p in found.values():
            sizes[p.requires_grad] += p.numel()
        out[m] = sizes[True], sizes[False]
    return out


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in their layout's order, runs of them as a-b."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and r == runs[-1][-1] + 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column and those after the numbers to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i in (1, 2) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def weight_bytes(blueprint: Blueprint) -> dict[str, int]:
    """Weights, gradients and AdamW moments that a rank keeps of each module, by even shares."""
    item = 8 if blueprint.cfg.train.dtype == "float64" else 4
    copies = {m: 1 if m in blueprint.frozen else 4 for m in blueprint.modules}
    return {m: elements_per_rank(blueprint, m) * item * copies[m] for m in blueprint.modules}


def memory_warning(blueprint: Blueprint, device: str, ranks_here: int) -> str | None:
    """What to say where weights, gradients and optimizer alone exceed a rank's memory on this machine; None
    where they fit. device: "cpu", whose memory `ranks_here` ranks share, or "cuda"."""
    held, needed = weight_bytes(blueprint), Counter[int]()
    for m, layout in blueprint.layouts.items():
        for r in layout.ranks:
            needed[r] += held[m]
    rank, most = max(needed.items(), key=lambda item: item[1])
    have = device_memory(device)
    shares = ranks_here if device == "cpu" else 1
    if have is None or most <= have // shares:
        return None
    where = f"a {device} device here has {gib(have)}"
    if device == "cpu":
        where = f"this host has {gib(have)} for {ranks_here} ranks, {gib(have // shares)} each"
    return (
        f"rank {rank} needs {gib(most)} for weights, gradients and optimizer alone, but {where}: the job "
        "will not fit on this machine; needed: more devices, higher degrees, or a smaller model"
    )


def gib(n: int) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
