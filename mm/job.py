"""From a config to what a rank trains with: layouts, modules on their meshes, data, boundary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import encoders
from encoders.module import EncoderModule, build_encoder_module
from llm.config import LLMConfig
from llm.config import check as check_llm
from llm.model import LLM, precise_modules
from mm.batch import Assembler
from mm.config import Config, build
from mm.control import Control, whole_job
from mm.data.index import Index, load_index
from mm.data.reader import ShardReader
from mm.data.tokenizer import make_tokenizer
from mm.errors import Refused
from mm.launch import RankInfo
from mm.plan import EncoderUse, PlanInputs, check_samples
from parallel.axis import Axes
from parallel.boundary import BoundaryCommunicator
from parallel.layout import Layout, check_divides, check_supported, make_layout
from parallel.mesh import ModuleMesh, build_mesh
from parallel.optim import AdamW, ShardedOptimizer
from parallel.param import declared
from parallel.shard import ShardPolicy, materialise, shard_module

SINK = "llm"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Blueprint:
    """What a config means, before any process group exists: everything that can be refused early.

    encoders: in the config's order, which is the order of their actions.
    """

    cfg: Config
    world: int
    llm: LLMConfig
    layouts: Mapping[str, Layout]
    inputs: PlanInputs

    @property
    def modules(self) -> list[str]:
        """All modules, encoders first, in one order on every rank."""
        return [*self.inputs.encoders, SINK]

    @property
    def frozen(self) -> set[str]:
        """Modules without a single trainable parameter."""
        out = {m for m in self.inputs.encoders if self.cfg.model[m].freeze == "all"}
        return out | ({SINK} if self.llm.freeze else set())


@dataclass(frozen=True)
class Data:
    """One data set: its index, and what turns its samples into this rank's tensors."""

    index: Index
    assembler: Assembler


@dataclass(frozen=True)
class Job:
    """A blueprint built on this rank. Modules, meshes and optimizers are absent where it hosts none."""

    blueprint: Blueprint
    rank: RankInfo
    modules: Mapping[str, nn.Module]
    meshes: Mapping[str, ModuleMesh]
    optimizers: Mapping[str, ShardedOptimizer]
    boundary: BoundaryCommunicator
    control: Control

    def close(self) -> None:
        """Destroy the job's process groups but the default one; every rank calls this."""
        for mesh in self.meshes.values():
            mesh.close()
        self.boundary.close()


def draw_up(cfg: Config, world: int) -> Blueprint:
    """Check a config against `world` ranks and work out its layouts; raises Refused in words."""
    try:
        return _draw_up(cfg, world)
    except ValueError as error:
        raise Refused(str(error)) from error


def _draw_up(cfg: Config, world: int) -> Blueprint:
    layouts = {m: make_layout(m, world, cfg.layout.get(m, {})) for m in [*cfg.model, SINK]}
    unknown = set(cfg.layout) - set(layouts)
    if unknown:
        raise ValueError(f"layout names {sorted(unknown)}, but the model's modules are {sorted(layouts)}")
    check_supported(layouts)
    vocab = make_tokenizer(cfg.data.tokenizer).vocab_size
    llm = build(LLMConfig, {"vocab_size": vocab, **cfg.llm}, "model.llm")
    if llm.vocab_size < vocab:
        raise ValueError(f"model.llm.vocab_size is {llm.vocab_size}; the tokenizer needs at least {vocab}")
    check_llm(llm, layouts[SINK].tp, layouts[SINK].ep)
    uses = {}
    for name, enc in cfg.model.items():
        cls = encoders.resolve(enc.encoder)
        options = build(cls.Config, enc.options, f"model.{name}.options")
        tp = layouts[name].tp if cls.tensor_parallel else 1
        cls.check(options, tp)
        check_divides(f"model.{name}.projector.hidden", enc.projector.hidden, "tp", tp)
        uses[name] = EncoderUse(cls, options, layouts[name], enc.deal)
    inputs = PlanInputs(layouts[SINK], uses, cfg.data.context, cfg.schedule.microbatches)
    return Blueprint(cfg, world, llm, layouts, inputs)


def open_data(blueprint: Blueprint, patterns: list[str], base: Path, rank: RankInfo) -> Data:
    """Load the index of the shards and check every sample against the model."""
    index = load_index(patterns, base)
    check_samples(index.samples, blueprint.inputs)
    tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    floating = torch.float64 if blueprint.cfg.train.dtype == "float64" else torch.float32
    assembler = Assembler(blueprint.inputs, ShardReader(), tokenizer, rank.rank, floating, rank.device)
    return Data(index, assembler)


def build_job(blueprint: Blueprint, rank: RankInfo) -> Job:
    """Make groups, modules, initial weights and optimizers. Every rank of the job calls this."""
    cfg = blueprint.cfg
    timeout = cfg.run.timeout_s
    # Groups first, by every rank in one order; then the modules that live here.
    meshes = {m: build_mesh(blueprint.layouts[m], rank.device.type) for m in blueprint.modules}
    everyone = sorted({r for layout in blueprint.layouts.values() for r in layout.ranks})
    edges = dist.new_group(everyone, timeout=timedelta(seconds=timeout))
    here = {m: mesh for m, mesh in meshes.items() if mesh is not None}
    modules = {m: _build_module(blueprint, m, mesh, rank.device) for m, mesh in here.items()}
    hyper = AdamW(cfg.train.betas, cfg.train.eps, cfg.train.weight_decay)
    return Job(
        blueprint,
        rank,
        modules,
        here,
        {m: ShardedOptimizer(module, here[m], hyper) for m, module in modules.items()},
        BoundaryCommunicator(edges, device=rank.device, timeout_s=timeout),
        Control(whole_job(), rank.device),
    )


def bare_module(blueprint: Blueprint, name: str, axes: Axes) -> nn.Module:
    """Module `name` with its global shapes, on the meta device: shapes and declarations without memory."""
    cfg, stored = blueprint.cfg, stored_dtype(blueprint.cfg)
    module: nn.Module
    if name == SINK:
        module = LLM(blueprint.llm, axes, device="meta", dtype=stored)
        module.recompute = cfg.train.recompute
        module.requires_grad_(not blueprint.llm.freeze)
        return module
    use, enc = blueprint.inputs.encoders[name], cfg.model[name]
    module = build_encoder_module(
        use.cls,
        use.cfg,
        d_out=blueprint.llm.d_model,
        projector_hidden=enc.projector.hidden,
        axes=axes,
        device="meta",
        dtype=stored,
    )
    module.encoder.recompute = cfg.train.recompute
    module.freeze(enc.freeze)
    return module


def stored_dtype(cfg: Config) -> torch.dtype:
    """Dtype of weights and optimizer state: float32 under bfloat16 compute."""
    return torch.float64 if cfg.train.dtype == "float64" else torch.float32


def module_sizes(blueprint: Blueprint) -> dict[str, list[tuple[int, int]]]:
    """By module: (elements, ranks that share them) of each parameter."""
    out: dict[str, list[tuple[int, int]]] = {}
    for name in blueprint.modules:
        layout = blueprint.layouts[name]
        sizes = []
        for _, param, spec in declared(bare_module(blueprint, name, Axes())):
            cut = spec.shard_dim is not None
            folded = layout.tp > 1 or layout.ep > 1
            if spec.view == "expert" and folded:
                ranks = layout.edp * (layout.ep if cut else 1)
            else:
                ranks = layout.dp * (layout.tp if cut and spec.view == "dense" else 1)
            sizes.append((param.numel(), ranks))
        out[name] = sizes
    return out


def _layers(module: nn.Module) -> list[nn.Module]:
    assert isinstance(module, LLM | EncoderModule)
    return list(module.layers)


def _build_module(blueprint: Blueprint, name: str, mesh: ModuleMesh, device: torch.device) -> nn.Module:
    cfg, stored = blueprint.cfg, stored_dtype(blueprint.cfg)
    compute = DTYPES[cfg.train.dtype]
    module = bare_module(blueprint, name, mesh.axes)
    precise = precise_modules(module) if isinstance(module, LLM) else []
    layers = _layers(module) if cfg.train.shard == "layer" else []
    policy = ShardPolicy(layers, compute if compute != stored else None, precise)
    shard_module(module, mesh, policy, param_dtype=stored)
    materialise(module, mesh, seed=cfg.run.seed, name=name, device=device)
    return module
