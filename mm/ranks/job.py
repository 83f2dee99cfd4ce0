"""Build a blueprint on this rank: meshes, modules, optimizers, boundaries and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from llm.model import LLM, precise_modules
from mm.config.outline import SINK
from mm.config.sources import SourceConfig
from mm.data.index import load_index
from mm.data.reader import ShardReader
from mm.data.sample import Index
from mm.data.tokenizer import make_tokenizer
from mm.errors import Refused
from mm.plan.blueprint import Blueprint, bare_module
from mm.plan.phases import short_samples
from mm.plan.pieces import with_pieces
from mm.plan.places import Places, places
from mm.plan.rates import rates
from mm.plan.recipe import update_rule
from mm.plan.select import select
from mm.plan.step_plan import Edge
from mm.plan.weights import layers_of
from mm.ranks.batch import Assembler
from mm.ranks.control import Control, whole_job
from mm.ranks.launch import RankInfo
from parallel.boundary import BoundaryCommunicator, PlanCache
from parallel.comm.pipeline import Pipe
from parallel.comm.turns import Turns
from parallel.comm.warm_up import Ends, warm_up
from parallel.sharding import whole
from parallel.sharding.optim import ShardedOptimizer
from parallel.sharding.shard import ShardPolicy, materialise, shard_module
from parallel.topology.axis import Axes
from parallel.topology.directions import Directions
from parallel.topology.groups import DIRECTIONS, Group, edge_ranks
from parallel.topology.mesh import ModuleMesh, build_mesh
from parallel.topology.process_groups import Groups, make_groups

# Rows take two hops where they spare a quarter of what crosses to other nodes. Ranks of tp that read the same
# rows spare half or more; the few rows that two shares of a stream both see are not worth a second message.
TWO_HOPS_SPARE = 0.25

Parts = Mapping[int, nn.Module]


@dataclass(frozen=True)
class Data:
    """One data set: its index, and the assembler that turns its samples into this rank's tensors."""

    index: Index
    assembler: Assembler


@dataclass(frozen=True)
class Job:
    """All that this rank trains with. A mapping lacks the modules and edges that this rank does not host."""

    blueprint: Blueprint
    rank: RankInfo
    parts: Mapping[str, Parts]  # by module, its pipeline stages here, by stage index
    groups: Groups
    meshes: Mapping[str, ModuleMesh]  # by module
    optimizers: Mapping[str, ShardedOptimizer]  # by module; none in a job that does not learn
    boundaries: Mapping[Edge, Directions[BoundaryCommunicator]]  # by edge, on the ranks at either end of it
    pipes: Mapping[str, Directions[Pipe]]  # by module, where it has several pipeline stages
    control: Control
    turns: Turns  # of two computations of the language model
    places: Mapping[str, Places]  # of every module; none where no statistics are asked

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's token losses count: it has the last stage and is the first of its tp ranks."""
        layout = self.blueprint.layouts[SINK]
        if SINK not in self.parts:
            return False
        at = layout.coord(self.rank.rank)
        return at.tp == 0 and at.pp == layout.pp - 1

    def modules(self) -> list[nn.Module]:
        """All parts on this rank."""
        return [part for parts in self.parts.values() for part in parts.values()]

    def close(self) -> None:
        """Destroy the job's process groups except the default one; every rank calls this.

        Torch's caches of DTensor sharding keep meshes alive, and with them groups and their threads. They are
        cleared here.
        """
        for parts in self.parts.values():
            for part in parts.values():
                whole.wait(part)  # the last update has started a gather
        self.groups.close()
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # torch has no types here


def open_index(
    blueprint: Blueprint, entries: Sequence[str | SourceConfig], base: Path, *, write: bool = True
) -> Index:
    """Load the index of the shards of entries of data.train, and check every sample against the model.

    write: store an index that had to be made beside its shard. Raises DataError (load_index, select).
    """
    rules = blueprint.cfg.data
    tokenizer = make_tokenizer(rules.tokenizer)
    index = load_index(
        [e if isinstance(e, str) else e.wanted for e in entries],
        base,
        layout=rules.layout,
        tokenizer=tokenizer,
        made_by=rules.made_by,
        write=write,
        storage=blueprint.storage,
    )
    index = with_pieces(index, blueprint.inputs, tokenizer)
    index = select(index, blueprint.inputs, rules, blueprint.storage)
    return replace(index, short=short_samples(index, blueprint.inputs, rules.lengths))


def open_indexes(blueprint: Blueprint, *, write: bool = True) -> dict[str, Index]:
    """The index of each data set of the config: training, and evaluation where there is one."""
    cfg = blueprint.cfg
    given = {"training": cfg.data.train, "evaluation": cfg.data.eval}
    return {name: open_index(blueprint, p, cfg.base, write=write) for name, p in given.items() if p}


def open_data(job: Job, index: Index) -> Data:
    """The samples of an index as this rank reads them."""
    axes = {m: mesh.axes for m, mesh in job.meshes.items()}
    return Data(index, assembler_of(job.blueprint, job.rank, axes))


def assembler_of(blueprint: Blueprint, rank: RankInfo, axes: Mapping[str, Axes]) -> Assembler:
    """What plans and builds a rank's part of a step. axes: by module here; one that only plans needs none."""
    return Assembler(
        inputs=blueprint.inputs,
        reader=ShardReader(blueprint.storage),
        tokenizer=make_tokenizer(blueprint.cfg.data.tokenizer),
        rank=rank.rank,
        dtype=blueprint.dtype,
        device=rank.device,
        axes=axes,
        sink=SINK,
        row_shapes={edge: blueprint.entry_shape(edge) for edge in blueprint.edges},
        plans=PlanCache(rank.rank, node_size=rank.node_size, spares=TWO_HOPS_SPARE),
        timeout_s=blueprint.cfg.run.timeout_s,
    )


def build_job(blueprint: Blueprint, rank: RankInfo, *, draw: bool = True, learns: bool = True) -> Job:
    """Make groups, modules, initial weights and optimizers. Every rank of the job calls this.

    draw: whether weights get their initial values; not where tensors have no values (mm.virtual).
    learns: whether there are optimizers; not where a model is only evaluated.
    """
    cfg = blueprint.cfg
    groups, meshes = make_meshes(blueprint, rank)
    turns = Turns(rank.device)
    here = {m: _taking(turns, mesh) for m, mesh in meshes.items() if mesh is not None}
    boundaries = _boundaries(groups, blueprint, rank)
    parts = {m: _build_parts(blueprint, m, mesh, rank, draw) for m, mesh in here.items()}
    optimizers = {
        m: ShardedOptimizer(
            list(own.values()),
            here[m],
            update_rule(cfg.train),
            shared=blueprint.shared if m == SINK else (),
            rate=rates(blueprint, m),
            average=cfg.train.average,
        )
        for m, own in parts.items()
        if learns
    }
    pipes = {
        m: Directions(*(Pipe(m, group, cfg.run.timeout_s) for group in mesh.pipeline))
        for m, mesh in here.items()
        if mesh.pipeline is not None
    }
    return Job(
        blueprint=blueprint,
        rank=rank,
        parts=parts,
        groups=groups,
        meshes=here,
        optimizers=optimizers,
        boundaries=boundaries,
        pipes=pipes,
        control=Control(whole_job(), rank.device, rank.store),
        turns=turns,
        places={m: places(blueprint, m) for m in blueprint.modules if cfg.train.statistics},
    )


def make_meshes(blueprint: Blueprint, rank: RankInfo) -> tuple[Groups, dict[str, ModuleMesh | None]]:
    """The process groups of a job, connected, and by module its meshes; None where it is not on this rank.
    Every rank of the job calls this."""
    groups = make_groups(blueprint.groups, timeout_s=blueprint.cfg.run.timeout_s, store=rank.store)
    # Before anything else is sent: later first uses would meet in whatever order the ranks come to them.
    warm_up(groups, rank.device, _ends(blueprint), node_size=rank.node_size)
    meshes = {
        m: build_mesh(layout, rank.device.type, groups=groups, shards=blueprint.shards(m))
        for m, layout in blueprint.layouts.items()
    }
    return groups, meshes


def _taking(turns: Turns, mesh: ModuleMesh) -> ModuleMesh:
    """The mesh with axes on which exchanges of experts' rows take turns."""
    axes = mesh.axes
    ep, etp = (replace(axis, turns=turns) for axis in (axes.ep, axes.etp))
    return replace(mesh, axes=replace(axes, ep=ep, etp=etp))


def _ends(blueprint: Blueprint) -> dict[tuple[str, int], Ends]:
    """By (source, stage) of an edge, the ranks at its two ends."""
    sink, layouts = blueprint.layouts[SINK], blueprint.layouts
    return {
        (e.source, e.stage): Ends(
            layouts[e.source].stage_ranks(layouts[e.source].pp - 1), sink.stage_ranks(e.stage % sink.pp)
        )
        for e in blueprint.edges
    }


def _boundaries(
    groups: Groups, blueprint: Blueprint, rank: RankInfo
) -> dict[Edge, Directions[BoundaryCommunicator]]:
    """The communicators of each edge of this rank: the edge joins its encoder's last stage and a sink stage.

    Each direction has a process group of its own, so that its messages have an order of their own.
    """
    timeout = blueprint.cfg.run.timeout_s
    out = {}
    for edge in blueprint.edges:
        source, dest = blueprint.layouts[edge.source], blueprint.layouts[SINK]
        if rank.rank in edge_ranks(source, dest, edge.stage):
            names = (Group("edge", edge.source, "", way, edge.stage) for way in DIRECTIONS)
            # An edge within one rank sends nothing, and has no group of its own.
            ways = (groups.find(name) or groups.alone() for name in names)
            out[edge] = Directions(
                *(BoundaryCommunicator(g, device=rank.device, timeout_s=timeout) for g in ways)
            )
    return out


def _build_parts(
    blueprint: Blueprint, name: str, mesh: ModuleMesh, rank: RankInfo, draw: bool
) -> dict[int, nn.Module]:
    layout, stages = blueprint.layouts[name], blueprint.stages[name]
    mine = range(layout.coord(rank.rank).pp, len(stages), layout.pp)
    return {s: _build_part(blueprint, name, s, mesh, rank.device, draw) for s in mine}


def _build_part(
    blueprint: Blueprint, name: str, stage: int, mesh: ModuleMesh, device: torch.device, draw: bool
) -> nn.Module:
    cfg, stored, compute = blueprint.cfg, blueprint.stored_dtype, blueprint.dtype
    make = partial(bare_module, blueprint, name, mesh.axes, blueprint.stages[name][stage])
    module = make()
    precise = precise_modules(module) if isinstance(module, LLM) else []
    layers = layers_of(module) if cfg.train.shard == "layer" else []
    held = blueprint.uses[name].params != "each"
    policy = ShardPolicy(layers, compute if compute != stored else None, precise, keep=held)
    shard_module(module, mesh, policy, param_dtype=stored)
    again = partial(make, "cpu") if name != SINK else None  # the language model declares its buffers
    try:
        materialise(module, mesh, seed=cfg.run.seed if draw else None, name=name, device=device, again=again)
    except ValueError as error:
        raise Refused(f"model.{name}: {error}") from error
    return module
