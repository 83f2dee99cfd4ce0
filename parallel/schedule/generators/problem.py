"""The input of the generators: modules with their layouts, the active sources by micro-batch, and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from parallel.schedule.checker.memory import Memory
from parallel.schedule.plan import ModuleUse, Place, places
from parallel.schedule.simulator.costs import Costs


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of make_schedule.

    ahead: for how many micro-batches a source on ranks of the sink may hold activations at once. None allows
        twice as many as the sink's pipeline has in flight. With a bound below what it has in flight, the
        pipeline is filled and drained once for each `ahead` micro-batches.
    batch: by source, how many micro-batches it computes at once; 1 where it is not named.
    costs: seconds of actions, for kinds whose order depends on time. None takes the defaults of Costs.
    slack: sources may be a computation further ahead than they need to be, so that rows and their gradients
        travel beside computations.
    overlap_experts: whether expert exchanges of one micro-batch of the sink run beside the computation of
        another, in pairs of a forward and a backward (Action.paired). None: where the simulated step is
        shorter so, and `limit` allows. The sink holds up to twice the activations.
    train: the step has backwards.
    optimizer: the step ends with the update.
    limit: the most activation memory that a rank may hold, in units of `memory`. A plan above it is refused.
    memory: bytes of activations, for `limit`. None counts 1 for a stage and micro-batch.
    """

    ahead: int | None = None
    batch: Mapping[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    slack: bool = True
    overlap_experts: bool | None = False
    train: bool = True
    optimizer: bool = False
    limit: float | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Problem:
    """A step to be scheduled.

    kind: a schedule's name, not "auto".
    modules: sources (encoders) and the sink (the language model), by name.
    active: by micro-batch, the sources that have items in it on any rank.
    paired: whether forwards and backwards of the sink run in pairs (orders.PAIRED).
    """

    kind: str
    modules: Mapping[str, ModuleUse]
    sink: str
    active: tuple[frozenset[str], ...]
    options: ScheduleOptions
    paired: bool = False

    @cached_property
    def batch(self) -> dict[str, int]:
        """By source, how many micro-batches it computes at once."""
        return {m: self.options.batch.get(m, 1) for m in self.modules if m != self.sink}

    @cached_property
    def colocated(self) -> tuple[str, ...]:
        """The sources that share at least one rank with the sink."""
        home = set(self.modules[self.sink].layout.ranks)
        return tuple(m for m in self.batch if home & set(self.modules[m].layout.ranks))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The distinct places of ranks."""
        return tuple(dict.fromkeys(places({m: u.layout for m, u in self.modules.items()}).values()))

    def learns(self, source: str) -> bool:
        """Whether a source has backwards."""
        return self.options.train and not self.modules[source].frozen

    def at(self, place: Place) -> tuple[int | None, dict[str, range]]:
        """(pipeline rank of the sink or None, stages of each source) at a place."""
        pp = dict(zip(self.modules, place, strict=True))
        here = {m: self.modules[m].stages_at(r) for m, r in pp.items() if r is not None and m != self.sink}
        return pp[self.sink], here
