"""A candidate: a layout of each module, a schedule, and what is computed again. It becomes a config. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mm.config.outline import SINK
from mm.config.schema import Config, resolve, with_layout
from parallel.topology.layout import DEGREES

UNSEARCHED = ("replicate", "zero1", "zero2")  # policies that no search has in its space (mm/search/space.py)


class Block(NamedTuple):
    """Ranks [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Degrees(NamedTuple):
    """The degrees of a module, and whether it has sequence parallelism; as in parallel.topology.layout."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    @property
    def model(self) -> int:
        """Ranks of one data rank in the dense view."""
        return self.tp * self.cp * self.pp

    def dp(self, size: int) -> int:
        """Data ranks on `size` ranks."""
        return size // self.model


class Choice(NamedTuple):
    """The layout of one module."""

    block: Block
    degrees: Degrees
    data_parallel: str

    @property
    def dp(self) -> int:
        """Its data ranks."""
        return self.degrees.dp(self.block.size)

    def pipeline_ranks(self, pp: int) -> Block:
        """The ranks of one pipeline rank."""
        n = self.block.size // self.degrees.pp
        return Block(self.block.start + pp * n, self.block.start + (pp + 1) * n)

    def mapping(self, world: int) -> dict[str, Any]:
        """As a config's `layout.MODULE`: ranks, policy and the degrees that are not 1."""
        start, stop = self.block
        out: dict[str, Any] = {"ranks": "all" if (start, stop) == (0, world) else f"{start}-{stop - 1}"}
        out |= {d: n for d in DEGREES if (n := getattr(self.degrees, d)) > 1}
        if self.degrees.sequence_parallel:
            out["sequence_parallel"] = True
        return {**out, "data_parallel": self.data_parallel}

    def describe(self) -> str:
        """As in tp2 dp4 on 0-7, zero3."""
        d = self.degrees
        parts = [f"{a}{n}" for a in ("tp", "cp", "pp", "vpp") if (n := getattr(d, a)) > 1]
        parts += [f"dp{self.dp}"] if self.dp > 1 else []
        parts += [f"{a}{n}" for a in ("ep", "etp") if (n := getattr(d, a)) > 1]
        parts += ["sp"] if d.sequence_parallel else []
        first, last = self.block.start, self.block.stop - 1
        ranks = f"{first}" if first == last else f"{first}-{last}"
        return f"{' '.join(parts) or 'whole'} on {ranks}, {self.data_parallel}"


@dataclass(frozen=True)
class Candidate:
    """What a step can be run as.

    world: ranks of the job. choices: by module, in the config's order, the language model last. recompute: as
        train.recompute. overlap_experts: as schedule.overlap_experts.
    """

    world: int
    choices: tuple[tuple[str, Choice], ...]
    kind: str
    microbatches: int
    recompute: tuple[str, ...] = ()
    overlap_experts: bool = False

    @property
    def by_module(self) -> Mapping[str, Choice]:
        return dict(self.choices)

    @property
    def sink(self) -> Choice:
        """The language model's."""
        return self.choices[-1][1]

    @property
    def placement(self) -> str:
        """colocated: encoders are on ranks of the language model. disjoint: none is. mixed: else."""
        sink = self.sink.block
        inside = {sink.start <= c.block.start < sink.stop for m, c in self.choices if m != SINK}
        return "mixed" if len(inside) == 2 else "disjoint" if False in inside else "colocated"

    @property
    def homogeneous(self) -> bool:
        """Whether all modules have the same degrees on the same ranks.

        The same are tp and cp, and so dp; and pp on all ranks, or, as where an encoder is the first part of
        one pipeline, none on the ranks of the language model's first pipeline rank. Experts and virtual
        stages are the language model's own. What tunes a module without placing it otherwise is free:
        sequence parallelism and the data-parallel policy.
        """
        sink = self.sink
        return all(as_in(choice, sink) for m, choice in self.choices if m != SINK)

    @property
    def unsearched(self) -> tuple[str, ...]:
        """Its choices that no search has in its space, as they are typed."""
        found = [f"layout.{m}.data_parallel={c.data_parallel}" for m, c in self.choices]
        found = [text for text in found if text.endswith(tuple(f"={policy}" for policy in UNSEARCHED))]
        return (*found, *(["schedule.overlap_experts=true"] if self.overlap_experts else []))

    def layout(self) -> dict[str, Any]:
        """The config's `layout:` mapping."""
        return {m: choice.mapping(self.world) for m, choice in self.choices}

    def schedule(self, cfg: Config) -> dict[str, Any]:
        """The config's `schedule:` mapping, where it is not as `cfg` has it. Bounds of another number of
        micro-batches go."""
        batch = {m: min(n, self.microbatches) for m, n in cfg.schedule.encoder_batch.items()}
        out: dict[str, Any] = {"kind": self.kind, "microbatches": self.microbatches}
        out |= {"encoder_batch": batch} if batch else {}
        out |= {"ahead": None} if cfg.schedule.ahead is not None else {}
        if self.overlap_experts == cfg.schedule.overlap_experts:
            return out
        return out | {"overlap_experts": self.overlap_experts}

    def overrides(self, cfg: Config) -> dict[str, Any]:
        """Dotted keys beside layout and schedule that differ from `cfg`."""
        from llm.recompute import recompute_parts

        if recompute_parts(cfg.train.recompute) == frozenset(self.recompute):
            return {}
        return {"train.recompute": recompute_value(self.recompute)}

    def config(self, cfg: Config) -> Config:
        """The run of `cfg` as this candidate; raises Refused where the config has a fault."""
        made = with_layout(cfg, self.layout(), self.schedule(cfg))
        if not self.overrides(cfg):
            return made
        from mm.config.advice import with_changes

        return with_changes(made, self.overrides(cfg))

    def describe(self) -> str:
        """One line for people."""
        modules = "; ".join(f"{m} {choice.describe()}" for m, choice in self.choices)
        again = f", recompute {'+'.join(self.recompute)}" if self.recompute else ""
        number = f"{self.microbatches} micro-batch{'es' if self.microbatches > 1 else ''}"
        pairs = ", experts' exchanges beside computation" if self.overlap_experts else ""
        return f"{modules}; {self.kind}, {number}{again}{pairs}"


def as_in(choice: Choice, sink: Choice) -> bool:
    """Whether a module has the degrees of the language model, on its ranks (Candidate.homogeneous)."""
    mine, its = choice.degrees, sink.degrees
    if (mine.tp, mine.cp) != (its.tp, its.cp):
        return False
    together = choice.block == sink.block and mine.pp == its.pp
    return together or (mine.pp == 1 and choice.block == sink.pipeline_ranks(0))


def recompute_value(parts: tuple[str, ...]) -> bool | list[str]:
    """Parts as train.recompute takes them."""
    return True if parts == ("full",) else list(parts) or False


def of_config(cfg: Config, world: int, policies: Mapping[str, str]) -> Candidate | None:
    """The candidate that a config is; None where its ranks are not one block a module.

    policies: by module, the data-parallel policy that it gets. Raises ValueError for a layout with a fault.
    """
    from llm.recompute import recompute_parts
    from parallel.schedule.generators.refuse import resolve as resolve_kind
    from parallel.topology.layout import make_layout

    if isinstance(cfg.train.recompute, dict):  # candidates recompute alike in all modules
        return None
    choices = []
    for m in (*cfg.model, SINK):
        x = make_layout(m, world, resolve(cfg)["layout"].get(m, {}))
        if x.ranks != tuple(range(x.ranks[0], x.ranks[0] + x.size)):
            return None
        degrees = Degrees(**x.degrees, sequence_parallel=x.sequence_parallel and x.tp > 1)
        choices.append((m, Choice(Block(x.ranks[0], x.ranks[-1] + 1), degrees, policies[m])))
        kind = resolve_kind(cfg.schedule.kind, x)
    again = tuple(sorted(recompute_parts(cfg.train.recompute)))
    pairs = cfg.schedule.overlap_experts is True
    return Candidate(world, tuple(choices), kind, cfg.schedule.microbatches, again, pairs)
