"""A run's model over its ranks, in use: tensor, expert and pipeline parallel as it trained, whole prompts.

Every rank asks the same. Weights are held as the model-parallel axes have them, not split over data ranks,
which all compute the same prompt; so do the ranks of cp. A token is chosen by one rank and sent to all with
the job's control message, which names a rank that does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from encoders.contract import Features, ItemBatch
from encoders.module import EncoderModule, hidden_shape
from llm.config import LLMConfig
from llm.decode import Next, Prompt, Sampling, decode_by, next_logits
from llm.model import LLM
from llm.stages import levels_of
from mm.checkpoint.state import with_kept
from mm.config.outline import SINK
from mm.config.schema import Config, from_mapping, override
from mm.data.tokenizer import AnyTokenizer, make_tokenizer
from mm.errors import CheckpointError, Refused
from mm.inference.whole import cast, fill, newest
from mm.plan.blueprint import Blueprint, bare_module
from mm.plan.inputs import EncoderUse
from mm.ranks.control import Control, whole_job
from mm.ranks.job import Parts, make_meshes
from mm.ranks.launch import RankInfo
from parallel import checkpoint as store
from parallel.comm.pipeline import Pipe
from parallel.sharding.shard import materialise, place_module
from parallel.topology.axis import Axes, Axis
from parallel.topology.mesh import ModuleMesh
from parallel.topology.process_groups import Groups
from parallel.topology.stage import Stage

Run = Callable[[nn.Module, Tensor | None], Tensor]


@dataclass(frozen=True)
class SpreadModel:
    """A model over the ranks of a job, in eval mode; see mm.inference.asked.Asked."""

    blueprint: Blueprint
    rank: RankInfo
    groups: Groups
    parts: Mapping[str, Parts]
    """By module, its pipeline stages here, by stage index."""
    pipes: Mapping[str, Pipe]
    """By module, where it has several pipeline stages."""
    control: Control
    tokenizer: AnyTokenizer
    dtype: torch.dtype
    begin: tuple[int, ...]
    stops: frozenset[int]

    @property
    def cfg(self) -> LLMConfig:
        """Of the language model."""
        return self.blueprint.llm

    @property
    def uses(self) -> Mapping[str, EncoderUse]:
        """By module of an encoder, how its items are prepared."""
        return self.blueprint.inputs.encoders

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.rank.device

    @torch.no_grad()
    def encode(self, module: str, batch: ItemBatch) -> Tensor:
        """The rows of items on all ranks, from those of the module; every rank calls this."""
        use = self.uses[module]

        def run(part: nn.Module, hidden: Tensor | None) -> Tensor:
            out = part(batch) if hidden is None else part(batch, hidden)
            return out.values if isinstance(out, Features) else out

        def shape(stage: Stage) -> tuple[int, ...]:
            return hidden_shape(use.cls, use.cfg, batch.metas, stage, Axes())

        mine = self._through(module, run, shape)
        self.control.any(False)  # names a rank that has not come
        rows = sum(use.cls.rows(use.cfg, meta) for meta in batch.metas)
        found = torch.empty(rows, *self.blueprint.row_shape(module), dtype=self.dtype, device=self.device)
        if mine is not None:
            found.copy_(mine)
        layout = self.blueprint.layouts[module]
        dist.broadcast(found, src=layout.rank_at(pp=layout.pp - 1))
        return found

    def decode(
        self, prompts: Sequence[Prompt], limit: int, sampling: Sampling, stops: Collection[int]
    ) -> Iterator[list[int | None]]:
        """llm.decode.decode() on all ranks; every rank calls this."""
        tp = self.blueprint.layouts[SINK].tp
        return decode_by(self._next, self.cfg, prompts, limit, sampling, stops, multiple=tp)

    def _next(self, step: Next) -> list[int]:
        layout = self.blueprint.layouts[SINK]
        leader = layout.rank_at(pp=layout.pp - 1)

        def run(part: nn.Module, hidden: Tensor | None) -> Tensor:
            assert isinstance(part, LLM)
            levels = levels_of(self.cfg, part.stage)
            rows = {
                edge: x if x.ndim == 2 else x[:, [k for k in levels if k < x.shape[1]]]
                for edge, x in step.rows.items()
            }
            out = part.states(step.batch, rows, step.ctx, hidden)
            return next_logits(part, out, step.batch.packing) if part.stage.last else out

        logits = self._through(SINK, run, lambda stage: (len(step.batch.ids), self.cfg.d_model))
        new = [-1] * step.documents
        if self.rank.rank == leader:
            assert logits is not None
            new = step.choose(logits)
        chosen = self.control.gather([float(token) for token in new])
        return [int(token) for token in chosen[leader]]

    def _through(self, module: str, run: Run, shape: Callable[[Stage], Sequence[int]]) -> Tensor | None:
        """The output of a module's last stage, on the ranks that have that; None on others.

        run: a stage. shape: of the hidden states that a stage, not the first, receives.
        """
        if module not in self.parts:
            return None
        start = time.monotonic()
        try:
            return self._computed(module, run, shape)
        except RuntimeError as error:
            if time.monotonic() - start < self.rank.timeout_s:
                raise
            raise self.control.overdue(error) from error

    def _computed(self, module: str, run: Run, shape: Callable[[Stage], Sequence[int]]) -> Tensor | None:
        """_through() of a module that is here."""
        layout, stages = self.blueprint.layouts[module], self.blueprint.stages[module]
        at, x = layout.coord(self.rank.rank), None
        for s, part in sorted(self.parts[module].items()):
            if s and layout.pp > 1:
                x = self.pipes[module].receive(
                    shape(stages[s]), self._peer(module, s - 1), s, dtype=self.dtype, device=self.device
                )()
            x = run(part, x)
            if s + 1 < len(stages) and layout.pp > 1:
                self.pipes[module].send(x, self._peer(module, s + 1), s + 1)
        if module in self.pipes:
            self.pipes[module].finish()
        return x if at.pp == layout.pp - 1 else None

    def _peer(self, module: str, stage: int) -> int:
        layout = self.blueprint.layouts[module]
        at = layout.coord(self.rank.rank)
        return layout.rank_at(tp=at.tp, cp=at.cp, dp=at.dp, pp=stage % layout.pp)

    def close(self) -> None:
        """Destroy the groups of the modules; every rank calls this."""
        self.control.any(False)  # none closes what another still uses
        self.groups.close()


def run_config(path: Path, overrides: Sequence[str]) -> tuple[Path, Config]:
    """The checkpoint of a run's folder, or of its own path, and the config that it was written under.

    overrides: key=value, such as another layout. Raises CheckpointError where there is none to be spread.
    """
    if (path / "config.json").is_file() and not (path / store.MANIFEST).is_file():
        raise Refused(f"{path} is a published folder, which has no layout; needed: one process, or a run")
    checkpoint = path if (path / store.MANIFEST).is_file() else newest(path)
    try:
        wrong = store.structure(checkpoint)
        if wrong:
            raise store.BadCheckpoint(f"it is damaged: {'; '.join(wrong)}")
        state = store.read_state(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"cannot load {checkpoint}: {error}") from error
    if SINK in state:
        raise Refused(f"{checkpoint} was imported, and has no layout; needed: one process, or a run")
    raw = with_kept(state["config"], checkpoint)
    for text in overrides:
        override(raw, text)
    return checkpoint, from_mapping(raw, checkpoint)


def load_spread(
    checkpoint: Path, blueprint: Blueprint, rank: RankInfo, dtype: torch.dtype | None = None
) -> SpreadModel:
    """The model of a checkpoint over the ranks of a job; every rank calls this, and reads what it holds.

    dtype: of the weights; None: as they are stored. Raises CheckpointError where files do not fit.
    """
    groups, meshes = make_meshes(blueprint, rank)
    here = {m: mesh for m, mesh in meshes.items() if mesh is not None}
    parts = {m: _parts(blueprint, m, mesh, rank) for m, mesh in here.items()}
    try:
        fill(checkpoint, [(m, part) for m, own in parts.items() for part in own.values()])
    except ValueError as error:
        raise CheckpointError(f"cannot load {checkpoint}: {error}") from error
    for own in parts.values():
        for part in own.values():
            cast(part, dtype)
            part.eval().requires_grad_(False)
    pipes = {
        m: Pipe(m, mesh.pipeline.forward, blueprint.cfg.run.timeout_s)
        for m, mesh in here.items()
        if mesh.pipeline is not None
    }
    tokenizer = make_tokenizer(blueprint.cfg.data.tokenizer)
    return SpreadModel(
        blueprint,
        rank,
        groups,
        parts,
        pipes,
        control=Control(whole_job(), rank.device, rank.store),
        tokenizer=tokenizer,
        dtype=dtype or blueprint.stored_dtype,
        begin=(tokenizer.bos,),
        stops=tokenizer.stops | {tokenizer.eos},
    )


def _parts(blueprint: Blueprint, name: str, mesh: ModuleMesh, rank: RankInfo) -> dict[int, nn.Module]:
    layout, stages = blueprint.layouts[name], blueprint.stages[name]
    axes = replace(mesh.axes, cp=Axis("cp"), sequence_parallel=False)
    out: dict[int, nn.Module] = {}
    for s in range(layout.coord(rank.rank).pp, len(stages), layout.pp):
        make = partial(bare_module, blueprint, name, axes, stages[s])
        module = make()
        place_module(module, mesh)
        again = partial(make, "cpu") if name != SINK else None
        materialise(module, mesh, seed=None, name=name, device=rank.device, again=again)
        assert isinstance(module, EncoderModule | LLM)
        out[s] = module
    return out
