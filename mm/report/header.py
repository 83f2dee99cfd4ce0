"""The header of a run, for people: printed at its start and by a dry run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mm.containers.registry import fitting
from mm.data.inspect import count_lines
from mm.data.sample import Index
from mm.plan.blueprint import Blueprint, bare_module
from mm.plan.data_parallel import policy_costs
from mm.plan.pieces import omissions
from mm.plan.sources import stream_of
from mm.plan.whole import whole_of
from mm.ranks.memory import device_memory
from mm.report.units import bytes_text
from parallel.topology.axis import Axes


def header(blueprint: Blueprint, indexes: Mapping[str, Index], device: str, backend: str) -> str:
    """Lines on run folder, ranks, schedule, each module's parameters and layout, and each data set.

    indexes: by data set. device: the ranks'; backend: of their messages.
    """
    cfg = blueprint.cfg
    train, counts = cfg.train, parameter_counts(blueprint)
    stored = str(blueprint.stored_dtype).removeprefix("torch.")
    kept = "" if stored == train.dtype else f", weights in {stored}"
    n = cfg.schedule.microbatches
    unit = "samples" if cfg.data.pack is None else "packed sequences"
    schedule = blueprint.schedule([set(cfg.model)] * n).kind
    lines = [
        f"run       {cfg.run.dir}",
        f"steps     {train.steps} of {train.global_batch} {unit} in {train.dtype}{kept}",
        *source_lines(blueprint, indexes.get("training")),
        f"ranks     {blueprint.world} on {device}, messages by {backend}",
        f"schedule  {schedule}, {n} micro-batch{'es' if n > 1 else ''} a step",
    ]
    lines += [f"export    {line}" for line in export_lines(blueprint)]
    rows: list[tuple[str, ...]] = [("module", "trained", "frozen", "ranks", "layout")]
    for m in blueprint.modules:
        layout = blueprint.layouts[m]
        count = counts[m]
        rows.append(
            (m, f"{count.trained:,}", f"{count.frozen:,}", ranks_text(layout.ranks), layout.describe())
        )
    trained, frozen = (sum(n) for n in zip(*counts.values(), strict=True))
    rows.append(("all", f"{trained:,}", f"{frozen:,}", "", ""))
    learn = {"training": list(blueprint.inputs.encoders)}
    data = [line for name, i in indexes.items() for line in count_lines(name, i, learn.get(name, ()))]
    out = [f"{name}: {x}" for name, i in indexes.items() for x in omissions(i, blueprint.inputs.encoders)]
    return "\n".join([*lines, *_aligned(rows), *data, *out])


def source_lines(blueprint: Blueprint, index: Index | None) -> list[str]:
    """The sources of the training data that the config names, and how they are packed."""
    cfg, out = blueprint.cfg, list[str]()
    if index is not None and (index.selections or index.short):
        stream, starts = stream_of(cfg, index), [0, *(e.until for e in cfg.data.lengths)]
        count = len(stream.sources) // len(starts)  # in a phase of data.lengths
        for phase, start in enumerate(starts):
            here = slice(phase * count, (phase + 1) * count)
            weights = stream.blend.weights_at(start)
            for source, weight in zip(stream.sources[here], weights[here], strict=True):
                epochs = "without end" if source.epochs is None else f"at most {source.epochs} epochs"
                share = "" if count == 1 else f", {weight / sum(weights):.4%} of the samples"
                name = (source.name or "all together") + (f", from sample {start} on" if start else "")
                out.append(f"source    {name}: {len(source.samples)} samples{share}, {epochs}")
    if cfg.data.pack is not None:
        budget = cfg.data.pack * cfg.train.global_batch
        out.append(f"packed    in sequences of {cfg.data.pack} tokens, at most {budget} tokens a step")
    return out


def export_lines(blueprint: Blueprint) -> list[str]:
    """As what `checkpoint export` will write the model; where no container can hold it, what each would need.

    Nothing for a language model alone.
    """
    if not blueprint.inputs.encoders:
        return []
    whole = whole_of(blueprint)
    container, wrong = fitting(whole)
    if container is not None:
        return [f"as {container.title}: {container.architecture} of transformers"]
    near = min(wrong, key=lambda title: len(wrong[title]))
    return ["a folder a module with a card; no container of transformers holds this model"] + [
        f"for {near}: {why}" for why in wrong[near]
    ]


class ParameterCount(NamedTuple):
    """Parameters of a whole module."""

    trained: int
    frozen: int


def parameter_counts(blueprint: Blueprint) -> dict[str, ParameterCount]:
    """By module, parameters of the whole model, counted once however it is laid out."""
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
        out[m] = ParameterCount(trained=sizes[True], frozen=sizes[False])
    return out


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in their layout's order, ascending runs as a-b."""
    runs: list[list[int]] = []
    for r in ranks:
        if runs and r == runs[-1][-1] + 1:
            runs[-1].append(r)
        else:
            runs.append([r])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines. The two columns of numbers are aligned to the right, all others to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i in (1, 2) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def weight_bytes(blueprint: Blueprint) -> dict[str, int]:
    """By module, bytes of weights, gradients and AdamW moments on a rank during a step (policy_costs)."""
    return {m: policy_costs(blueprint, m)[blueprint.policies[m]].step for m in blueprint.modules}


def memory_warning(blueprint: Blueprint, device: str, ranks_here: int) -> str | None:
    """A warning where weights, gradients and optimizer alone exceed a rank's memory here, else None.

    device: "cpu", whose memory `ranks_here` ranks share, or "cuda".
    """
    held, needed = weight_bytes(blueprint), Counter[int]()
    for m, layout in blueprint.layouts.items():
        for r in layout.ranks:
            needed[r] += held[m]
    rank, most = max(needed.items(), key=lambda item: item[1])
    have = device_memory(device)
    shares = ranks_here if device == "cpu" else 1
    if have is None or most <= have // shares:
        return None
    where = f"a {device} device here has {bytes_text(have)}"
    if device == "cpu":
        where = f"this host has {bytes_text(have)} for {ranks_here} ranks, {bytes_text(have // shares)} each"
    return (
        f"rank {rank} needs {bytes_text(most)} for weights, gradients and optimizer alone, but {where}: "
        "the job will not fit on this machine; needed: more devices, higher degrees, or a smaller model"
    )
