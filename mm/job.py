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
from mm.control import Control
from mm.data.index import Index, load_index
from mm.data.reader import ShardReader
from mm.data.tokenizer import Tokenizer, make_tokenizer
from mm.errors import Refused
from mm.launch import RankInfo
from mm.plan import EncoderUse, PlanInputs, check_samples
from parallel.boundary import BoundaryCommunicator
from parallel.layout import Layout, make_layout, unsupported
from parallel.mesh import ModuleMesh, build_mesh
from parallel.optim import AdamW, ShardedOptimizer
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
        out = {m for m in self.inputs.encoders if self.cfg.model.encoders[m].freeze == "all"}
        return out | ({SINK} if self.llm.freeze else set())


@dataclass(frozen=True)
class Data:
    """One data set: its index, and what turns its samples into this rank's tensors."""

    index: Index
    assembler: Assembler


@dataclass(frozen=True)
class Job:
    """A blueprint built on this rank. Modules, meshes and optimizers are absent where it does not host them."""

    blueprint: Blueprint
    rank: RankInfo
    modules: Mapping[str, nn.Module]
    meshes: Mapping[str, ModuleMesh]
    optimizers: Mapping[str, ShardedOptimizer]
    boundary: BoundaryCommunicator
    control: Control


def draw_up(cfg: Config, world: int) -> Blueprint:
    """Check a config against `world` ranks and work out its layouts; raises Refused in words. Starts nothing."""
    try:
        return _draw_up(cfg, world)
    except ValueError as error:
        raise Refused(str(error)) from error


def _draw_up(cfg: Config, world: int) -> Blueprint:
    layouts = {m: make_layout(m, world, cfg.layout.get(m, {})) for m in [*cfg.model.encoders, SINK]}
    unknown = set(cfg.layout) - set(layouts)
    if unknown:
        raise ValueError(f"layout names {sorted(unknown)}, but the model's modules are {sorted(layouts)}")
    problem = unsupported(layouts)
    if problem:
        raise ValueError(problem)
    llm = build(LLMConfig, {**cfg.model.llm, "vocab_size": make_tokenizer(cfg.data.tokenizer).vocab_size}, "model.llm")
    check_llm(llm, layouts[SINK].tp, layouts[SINK].ep)
    uses = {}
    for name, enc in cfg.model.encoders.items():
        cls = encoders.resolve(enc.encoder)
        options = build(cls.Config, enc.options, f"model.{name}")
        if cls.tensor_parallel:
            cls.check(options, layouts[name].tp)
        uses[name] = EncoderUse(cls, options, layouts[name], enc.deal)
    inputs = PlanInputs(layouts[SINK], uses, cfg.data.context, cfg.schedule.microbatches)
    return Blueprint(cfg, world, llm, layouts, inputs)


def open_data(blueprint: Blueprint, patterns: list[str], base: Path, rank: RankInfo) -> Data:
    """Load the index of the shards and check every sample against the model."""
    index = load_index(patterns, base)
    check_samples(index.samples, blueprint.inputs)
    tokenizer: Tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    floating = torch.float64 if blueprint.cfg.train.dtype == "float64" else torch.float32
    assembler = Assembler(
        blueprint.inputs, ShardReader(index), tokenizer, rank.rank, floating, rank.device
    )
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
    hyper = AdamW(tuple(cfg.train.betas), cfg.train.eps, cfg.train.weight_decay)
    return Job(
        blueprint,
        rank,
        modules,
        here,
        {m: ShardedOptimizer(module, here[m], hyper) for m, module in modules.items()},
        BoundaryCommunicator(edges, device=rank.device, timeout_s=timeout),
        Control(dist.group.WORLD, rank.device),
    )


def _build_module(
    blueprint: Blueprint, name: str, mesh: ModuleMesh, device: torch.device
) -> nn.Module:
    cfg = blueprint.cfg
    dtype = DTYPES[cfg.train.dtype]
    stored = torch.float32 if dtype == torch.bfloat16 else dtype
    compute = dtype if dtype != stored else None
    module: nn.Module
    if name == SINK:
        module = LLM(blueprint.llm, mesh.axes, device="meta", dtype=stored)
        module.recompute = cfg.train.recompute
        module.requires_grad_(not blueprint.llm.freeze)
        layers, precise = list(module.layers), precise_modules(module)
    else:
        use, enc = blueprint.inputs.encoders[name], cfg.model.encoders[name]
        module = build_encoder_module(
            use.cls,
            use.cfg,
            d_out=blueprint.llm.d_model,
            projector_hidden=enc.projector.hidden,
            axes=mesh.axes,
            device="meta",
            dtype=stored,
        )
        assert isinstance(module, EncoderModule)
        module.set_recompute(cfg.train.recompute)
        module.freeze(enc.freeze)
        layers, precise = list(module.layers), []
    policy = ShardPolicy(layers if cfg.train.shard == "layer" else (), compute, precise)
    shard_module(module, mesh, policy, param_dtype=stored)
    materialise(module, mesh, seed=cfg.run.seed, name=name, device=device)
    return module
