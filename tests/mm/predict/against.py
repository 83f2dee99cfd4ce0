"""Counts of random layouts beside the virtual rank's: `python -m tests.mm.predict.against FIRST COUNT`.

--dtype names the dtype of computation, bfloat16 by default; weights are stored in float32 or wider.
Each seed is a model, a layout and a rank of it. Printed is, a line of JSON each, by how much counts are off,
as a share of what the virtual rank has.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import warnings
from collections import Counter
from typing import Any

from mm.config.schema import from_mapping
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, draw_up
from mm.predict.count.rank import RankCounts, count_rank
from mm.predict.count.rank_plan import Sent
from mm.virtual import virtual_data, virtual_rank
from mm.virtual.accelerator import accelerator
from mm.virtual.records import Trace
from mm.virtual.run import first_plan
from tests.mm.harness import CONFIGS, small

NODE = 4  # ranks of a node
WIDTHS = {"d_model": 128, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "mlp_ffn": 512}
WIDTHS |= {"vocab_size": 1024, "loss_chunk": 700}
SCAN = {"mamba_heads": 16, "mamba_head_dim": 16, "mamba_state": 16, "mamba_groups": 4, "chunk": 64}
EXPERTS = {"n_experts": 8, "top_k": 2, "expert_ffn": 64, "shared_ffn": 128}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**WIDTHS, "pattern": "*-*-*-*-", "rope_theta": 1e4, "mlp_gated": True, "activation": "silu"},
    "hybrid": {**WIDTHS, **SCAN, **EXPERTS, "pattern": "ME*-ME*E"},
}
VISION = {
    "encoder": "vit",
    "projector": {"hidden": 96},
    "options": {"width": 96, "heads": 8, "layers": 4, "mlp": 192, "max_grid": 16},
}
# Instead of the ViT, of the same width and depth.
SIZES = {"width": 96, "heads": 8, "layers": 4, "mlp": 192}
TABLED = ("siglip", "siglip2", "clip", "image_vit", "dinov2", "internvl")
FAMILIES: dict[str, dict[str, Any]] = {name: {"table": 8} for name in TABLED}
FAMILIES |= {"dinov3": {}, "pixtral": {}, "radio": {"table": 16}, "qwen3_vl": {"table": 8, "merged": 128}}
AUDIO = {
    "encoder": "fastconformer",
    "projector": {"hidden": 96},
    "options": {"mels": 16, "channels": 8, "width": 96, "heads": 8, "layers": 4, "ffn": 192},
}
PLACES = {
    "colocated": {"vision": "all", "audio": "all", "llm": "all"},
    "disjoint": {"vision": "0-1", "audio": "2-3", "llm": "4-7"},
    "mixed": {"vision": "0-3", "audio": "4-7", "llm": "0-7"},
}
RECOMPUTED = (False, False, True, ["mlp", "norm"], ["scan", "attention_core", "moe_act"])


def drawn(seed: int, dtype: str = "bfloat16") -> tuple[str, Blueprint, int]:
    """(model and placement, blueprint, rank) of a seed: the first of its draws that can be run in `dtype`."""
    rng, *others = (random.Random(of) for of in (seed, f"switches of {seed}", f"families of {seed}"))
    switches, families = others
    while True:
        model = rng.choice(list(MODELS))
        place = rng.choice(list(PLACES)) if model == "hybrid" else "colocated"
        raw = _config(rng, model, place)
        raw["train"]["dtype"] = dtype
        _switch(switches, raw, model)
        if model == "hybrid" and families.random() < 0.5:
            family = families.choice(list(FAMILIES))
            options = {**SIZES, "patch": 4, "pictures": {"fit": "none"}, **FAMILIES[family]}
            raw["model"]["vision"] = {**VISION, "encoder": family, "options": options}
        try:
            blueprint = draw_up(from_mapping(raw, CONFIGS), 8)
        except Refused:
            continue
        return f"{model}, {place}", blueprint, rng.randrange(8)


def _config(rng: random.Random, model: str, place: str) -> dict[str, Any]:
    encoders = {"vision": VISION, "audio": AUDIO} if model == "hybrid" else {}
    layout = {m: {"ranks": PLACES[place][m], **_degrees(rng, m == "llm")} for m in (*encoders, "llm")}
    raw = small(
        train={"global_batch": 8, "recompute": rng.choice(RECOMPUTED)},
        data={"train": ["nowhere/*.tar"], "context": rng.choice([256, 512])},
        run={"device": "cuda", "node_size": NODE},
        schedule={"microbatches": rng.choice([1, 2, 4])},
    )
    raw["model"] = {**encoders, "llm": {**raw["model"]["llm"], **MODELS[model]}}
    raw["layout"] = layout
    return raw


def _switch(rng: random.Random, raw: dict[str, Any], model: str) -> None:
    """Have some of what a model may have beside its sizes."""
    llm = raw["model"]["llm"]
    if rng.random() < 0.3:
        llm["window"] = rng.choice([16, 48, 100])
        llm["window_layers"] = rng.choice([None, [2]])
    if model == "hybrid" and rng.random() < 0.3:
        llm["dispatcher"] = "all_gather"
    if model == "hybrid" and rng.random() < 0.3:
        llm |= {"mtp_layers": rng.choice([1, 2]), "mtp_pattern": "*E"}
    if rng.random() < 0.2:
        raw["train"]["lora"] = {m: {"rank": 4} for m in raw["model"] if rng.random() < 0.7}


def _degrees(rng: random.Random, sink: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"tp": rng.choice([1, 1, 2]), "cp": rng.choice([1, 1, 2])}
    out |= {"pp": rng.choice([1, 1, 2]), "sequence_parallel": rng.random() < 0.5}
    out["data_parallel"] = rng.choice(["auto", "auto", "replicate", "zero1", "zero2", "zero3", "hsdp"])
    if sink:
        out |= {"ep": rng.choice([1, 2, 4]), "etp": rng.choice([1, 1, 2]), "vpp": rng.choice([1, 1, 2])}
    return out


def errors(trace: Trace, counts: RankCounts) -> dict[str, float]:
    """By how much counts are off, each as a share of what the virtual rank has."""
    out = {}
    for m, flops in module_flops(trace).items():
        out[f"FLOPs of {m}"] = counts.flops.get(m, 0.0) / flops - 1 if flops else 0.0
    peak = trace.memory.peak
    out["peak"] = counts.peak / peak - 1
    for kind in ("parameters", "optimizer", "gathered_parameters"):
        out[kind] = (counts.kinds.get(kind, 0.0) - trace.memory.by_kind[kind]) / peak
    found, nodes = sent(trace), [0.0, 0.0]
    for one in found.keys() | counts.sent.keys():
        a, b = found.get(one, 0), counts.sent.get(one, 0.0)
        crosses = min(one.members) // NODE != max(one.members) // NODE
        nodes = [nodes[0] + a * crosses, nodes[1] + b * crosses]
        # Messages of a few numbers, by which the host sizes others, are not worth a count.
        if max(a, b) > 4096:
            out[f"{one.op} {one.members}"] = (b - a) / max(a, 1)
    out["bytes across nodes"] = (nodes[1] - nodes[0]) / max(nodes[0], 1.0) if max(nodes) > 4096 else 0.0
    return out


def module_flops(trace: Trace) -> dict[str, int]:
    """FLOPs by module. Torch's formula takes the backward of a depthwise convolution for that of a whole one:
    each weight is used once an output, for the gradient of the input and for its own."""
    out = trace.flops_by_module
    for k in trace.kernels:
        if k.op.startswith("aten.convolution_backward"):
            grad, x, weight = k.shapes[:3]
            if weight[1] < x[1]:
                out[k.module] += k.count * (4 * math.prod(grad) * math.prod(weight[1:]) - k.flops)
    return out


def sent(trace: Trace) -> Counter[Sent]:
    """Bytes of a step's calls. Weights that stay whole are gathered at the end of a step for the next one; a
    first step gathers them at its start too."""
    out: Counter[Sent] = Counter()
    for c in trace.calls:
        if not (c.during == "update" and c.op == "all_gather"):
            out[Sent(c.op, tuple(c.members))] += c.bytes
    return out


def main(seeds: range, dtype: str) -> None:
    """Compare the layouts of some seeds."""
    warnings.simplefilter("ignore")
    device = accelerator()
    for seed in seeds:
        name, blueprint, rank = drawn(seed, dtype)
        data = virtual_data(blueprint)
        trace = virtual_rank(blueprint, rank, device, data=data)
        found = errors(trace, count_rank(blueprint, first_plan(blueprint, data.index), rank))
        given = blueprint.cfg.model_dump(include={"layout"})["layout"]
        train, micro = blueprint.cfg.train, blueprint.cfg.schedule.microbatches
        said = f"{given}, {micro} micro-batches, recompute {train.recompute}"
        off = {k: round(e, 5) for k, e in found.items() if abs(e) > 0.01}
        worst = max(found.values(), key=abs)
        line = {"seed": seed, "of": name, "rank": rank, "peak": round(found["peak"], 5), "off": off}
        line["adapters"] = sorted(train.lora)
        line["encoders"] = [use.cls.__name__ for use in blueprint.inputs.encoders.values()]
        print(
            json.dumps({**line, "worst": round(worst, 5), "layout": said, "during": trace.memory.during}),
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare counts of random layouts with the virtual rank's.")
    parser.add_argument("first", type=int, help="the first seed")
    parser.add_argument("count", type=int, help="how many seeds")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float64"), default="bfloat16")
    given = parser.parse_args()
    main(range(given.first, given.first + given.count), given.dtype)
