"""Plan: the best layouts of a config on some devices, with the proof that nothing better was left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mm.config.schema import Config
from mm.errors import Refused
from mm.plan.blueprint import Blueprint
from mm.predict.hardware import Hardware
from mm.predict.step import check_room
from mm.search.candidate import Candidate, Choice, Degrees
from mm.search.first import Search
from mm.search.goals import Goal, goals
from mm.search.limits import space_of
from mm.search.load import StepLoad
from mm.search.pieces import Pieces
from mm.search.predictor import Judged, Predictor
from mm.search.rejected import Rejected, Rejects
from mm.search.tree import Node, Tree

# Branches of a beam: placements, degrees, micro-batches, schedules and policies, encoders.
WIDTHS = (2, 40, 10, 6, 3)
BEAMS = 0.5  # of the time that they may take together
LIKELY = (0.8, 0.5)  # of the memory: bounds of what is predicted first, so that it likely fits
SECONDS = 50.0  # processor seconds that a search takes at most, by default


@dataclass(frozen=True)
class Proof:
    """What is known of a goal. proved: nothing left out can be better. least: seconds that what was left out
    takes at least; math.inf where nothing was."""

    proved: bool
    least: float


@dataclass(frozen=True)
class Plan:
    """What a search found.

    best: in order. of: by goal, its best candidate, None where none fits. proofs: by goal. considered:
    candidates of the space; predicted: of these in full. nearest: the largest share of a prediction that its
    bound was: above 1 a bound was wrong, and nothing is proved. note: whose samples the step has.
    """

    best: tuple[Judged, ...]
    of: Mapping[str, Judged | None]
    proofs: Mapping[str, Proof]
    considered: int
    predicted: int
    nearest: float
    rejected: tuple[Rejected, ...]
    seconds: float
    note: str

    @property
    def proved(self) -> bool:
        """Whether the best few are."""
        return self.proofs["best"].proved and self.nearest <= 1.0

    @property
    def gain(self) -> float | None:
        """How many times faster the best is than the best homogeneous one."""
        other = self.of.get("homogeneous")
        return other.step_s / self.best[0].step_s if other is not None and self.best else None

    @property
    def frontier(self) -> tuple[Judged, ...]:
        """Of the candidates found, those that no other beats in both seconds and bytes, fastest first."""
        found = {j.candidate: j for j in (*self.best, *self.of.values()) if j is not None}
        out: list[Judged] = []
        for judged in sorted(found.values(), key=lambda j: (j.step_s, j.bytes)):
            if not out or judged.bytes < out[-1].bytes:
                out.append(judged)
        return tuple(out)


Progress = Callable[[str, int, float], object]  # of a goal: candidates predicted so far, best seconds so far


@dataclass
class Planner:
    """A search of all candidates. top: how many of the best. limit: processor seconds."""

    cfg: Config
    world: int
    hardware: Hardware
    top: int = 3
    limit: float = SECONDS
    tell: Progress = lambda goal, n, best: None
    judged: dict[Node, Judged] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Search. Raises Refused where no candidate fits, with what would."""
        start = time.process_time()
        predictor = Predictor(self.cfg, self.world, self.hardware)
        plain = plain_candidate(self.cfg, self.world)
        blueprint = predictor.blueprint(plain.config(self.cfg))
        load = step_load(predictor, blueprint)
        pieces = Pieces(blueprint, load, self.hardware, blueprint.node_size)
        check_room(pieces.weights.states(), self.world, self.hardware)
        space = space_of(blueprint)
        rejects = Rejects(self.hardware)
        room = self.hardware.memory.bytes - self.hardware.memory.reserved
        host = self.hardware.host
        cores = math.inf if host is None else host.cores
        tree = Tree(space, pieces, room, cores, rejects.dropped)

        def cost(leaf: Node) -> float:
            found = self.judged[leaf] = predictor.judge(tree.candidate(leaf))
            rejects.judged(found)
            self.tell(goal.name, len(self.judged), best_so_far())
            return found.step_s if found.why is None else math.inf

        def best_so_far() -> float:
            return min((j.step_s for j in self.judged.values() if j.why is None), default=math.inf)

        search = Search(tree.expand, cost)
        roots = list(tree.roots())
        found, proofs = dict[str, tuple[Judged, ...]](), dict[str, Proof]()
        every = goals(space, self.top, self.hardware.memory.bytes)
        for i, goal in enumerate(every):
            left = max(0.0, self.limit * BEAMS - (time.process_time() - start))
            self._beam(search, roots, goal, time.process_time() + left / (len(every) - i))
        for i, goal in enumerate(every):
            # The main goal may take half of the time, each other an even share of what is left.
            left = self.limit - (time.process_time() - start)
            until = time.process_time() + left * (0.5 if i == 0 else 1 / (len(every) - i))
            result = search.best(roots, goal.k, keep=self._keeps(goal), stop=_after(until))
            found[goal.name] = tuple(self.judged[leaf] for _, leaf in result.best)
            proofs[goal.name] = Proof(result.proved, result.least)
            if i == 0:
                rejects.left(result.left, found[goal.name])
        # Where a search was stopped, what another one has found counts too.
        for goal in every:
            if not proofs[goal.name].proved:
                best = search.best_known(goal.k, self._keeps(goal))
                found[goal.name] = tuple(self.judged[leaf] for _, leaf in best)
        if not found["best"]:
            raise Refused(rejects.nothing(self.world, search_ended=proofs["best"].proved))
        return Plan(
            best=found["best"],
            of={name: judged[0] if judged else None for name, judged in found.items()},
            proofs=proofs,
            considered=sum(root.size for root in roots),
            predicted=len(self.judged),
            nearest=self._nearest(),
            rejected=rejects.grouped(),
            seconds=time.process_time() - start,
            note=predictor.note,
        )

    def _beam(self, search: Search[Node], roots: list[Node], goal: Goal, until: float) -> None:
        """Predict some candidates that are likely to be good, and to fit."""
        for share in LIKELY:
            within = replace(goal, limit=share * goal.limit)
            keep = self._keeps(replace(within, keep=lambda node: goal.keep(node) and _simple(node)))
            search.beam(roots, WIDTHS, keep=keep, stop=_after(until))
            if search.best_known(1, self._keeps(goal)):
                return

    def _keeps(self, goal: Goal) -> Callable[[Node], bool]:
        reserved = self.hardware.memory.reserved

        def keep(node: Node) -> bool:
            judged = self.judged.get(node)
            fits = node.bytes + reserved if judged is None else judged.bytes
            return fits <= goal.limit and goal.keep(node)

        return keep

    def _nearest(self) -> float:
        reserved = self.hardware.memory.reserved
        every = [(n, j.prediction) for n, j in self.judged.items() if j.prediction is not None]
        seconds = [n.bound / p.step_s for n, p in every]
        return max([*seconds, *((n.bytes + reserved) / p.peak_memory_bytes for n, p in every)], default=0.0)


def _simple(node: Node) -> bool:
    """Candidates that are quick to predict, and that large models tend to run as."""
    d = node.degrees
    if d is None:
        return True
    few = node.microbatches <= 4 * d.pp
    return d.vpp == d.cp == d.etp == 1 and few and node.kind in ("", "1f1b")


def _after(until: float) -> Callable[[], bool]:
    return lambda: time.process_time() > until


def step_load(predictor: Predictor, blueprint: Blueprint) -> StepLoad:
    """The load of the first step of a job."""
    return StepLoad.of(blueprint, lambda inputs: predictor.plan(replace(blueprint, inputs=inputs), None))


def plain_candidate(cfg: Config, world: int) -> Candidate:
    """All modules data parallel on all ranks: what does not depend on layouts is read from it."""
    from mm.config.outline import SINK
    from mm.search.candidate import Block

    choices = tuple((m, Choice(Block(0, world), Degrees(), "zero3")) for m in (*cfg.model, SINK))
    return Candidate(world, choices, "1f1b", 1)
