"""Plan: the best layouts of a config on some devices, with the proof that nothing better was left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mm.config.schema import Config
from mm.errors import Refused
from mm.plan.blueprint import Blueprint
from mm.predict.hardware import Hardware
from mm.predict.step import check_room
from mm.search.candidate import Candidate, Choice, Degrees
from mm.search.finder import Finder, closest
from mm.search.first import B, Search
from mm.search.goals import Goal, goals, homogeneous
from mm.search.limits import space_of
from mm.search.load import StepLoad
from mm.search.pieces import Pieces
from mm.search.polish import SHARE, Found, Polisher
from mm.search.predictor import Judged, Predictor
from mm.search.rejected import Rejected, Rejects
from mm.search.space import Space
from mm.search.tree import Node, Tree

FINDING = 0.7  # of the time that finding good candidates may take, before anything is proved
SECONDS = 50.0  # processor seconds that a search takes at most, by default


@dataclass(frozen=True)
class Proof:
    """What is known of a goal. proved: nothing left out can be better. least: seconds that what was left out
    takes at least; math.inf where nothing was."""

    proved: bool
    least: float

    def gap(self, found: Sequence[Judged]) -> float | None:
        """The share by which what was left out can be faster than the last of what was found; None where
        nothing was."""
        if not found:
            return None
        return max(0.0, found[-1].step_s / self.least - 1) if self.least else math.inf

    def within(self, found: Sequence[Judged], share: float) -> bool:
        """Whether what was left out is faster by no more than a share."""
        gap = self.gap(found)
        return gap is not None and gap <= share

    def without(self, found: Sequence[Judged], last: Sequence[Judged]) -> Proof:
        """Of what is still there: what was found and has given way counts as left out."""
        gone = [j.step_s for j in found if j not in last]
        return Proof(self.proved, min([self.least, *gone]))


@dataclass(frozen=True)
class Plan:
    """What a search found.

    best: in order. of: by goal, its best candidate, None where none fits. searched: by goal, its best few of
    the space, before they were polished (mm/search/polish.py). proofs: by goal, of the searched space.
    within: what was enough. space: what was searched. known: all predictions, by candidate. considered:
    candidates of the space; predicted: of these in full; polished: those that polishing has predicted
    beside. missing: by goal of which nothing was found, what
    those predicted lack. nearest: the largest share of a prediction that its bound was: above 1 a bound was
    wrong, and nothing is proved. note: whose samples the step has.
    """

    best: tuple[Judged, ...]
    of: Mapping[str, Judged | None]
    searched: Mapping[str, Sequence[Judged]]
    proofs: Mapping[str, Proof]
    missing: Mapping[str, str]
    within: float
    space: Space
    known: Mapping[Candidate, Judged]
    considered: int
    predicted: int
    polished: int
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
    """A search of all candidates. top: how many of the best. limit: processor seconds. within: it ends as
    soon as nothing left out can be faster than the best few by more than this share. finish: whether the best
    is polished until no change helps (mm/search/polish.py), whatever the time."""

    cfg: Config
    world: int
    hardware: Hardware
    top: int = 3
    limit: float = SECONDS
    within: float = 0.0
    finish: bool = False
    tell: Progress = lambda goal, n, best: None
    judged: dict[Node, Judged] = field(default_factory=dict)
    _goal: str = ""

    def plan(self) -> Plan:
        """Search. Raises Refused where no candidate fits, with what would."""
        start = time.process_time()
        predictor = Predictor(self.cfg, self.world, self.hardware)
        rejects = Rejects(self.hardware)
        tree = self._tree(predictor, rejects)

        def cost(leaf: Node) -> float:
            found = self.judged[leaf] = predictor.judge(tree.candidate(leaf))
            rejects.judged(found)
            best = min((j.step_s for j in self.judged.values() if j.why is None), default=math.inf)
            self.tell(self._goal, len(self.judged), best)
            return found.step_s if found.why is None else math.inf

        search = Search(tree.expand, cost)
        roots = list(tree.roots())
        every = goals(tree.space, self.top, self.hardware.memory.bytes)
        finder = Finder(tree, roots, self._judge(search))
        found, proofs = self._search(finder, search, every, rejects, start)
        if not found["best"]:
            raise Refused(rejects.nothing(self.world, search_ended=proofs["best"].proved))
        polisher = Polisher(tree.space, predictor.judge, {j.candidate: j for j in self.judged.values()})
        last = polisher.every(every, found, start + self.limit, finish=self.finish)
        self._know(tree, last)
        return Plan(
            best=tuple(last["best"]),
            of={name: judged[0] if judged else None for name, judged in last.items()},
            searched=found,
            proofs={name: proof.without(found[name], last[name]) for name, proof in proofs.items()},
            within=self.within,
            space=tree.space,
            known=polisher.known,
            missing={g.name: why for g in every if not found[g.name] and (why := closest(self.judged, g))},
            considered=sum(root.size for root in roots),
            predicted=len(self.judged),
            polished=len(polisher.known.keys() - {j.candidate for j in self.judged.values()}),
            nearest=max(self._nearest(tree, last), self._above(search, roots)),
            rejected=rejects.grouped(),
            seconds=time.process_time() - start,
            note=predictor.note,
        )

    def _tree(self, predictor: Predictor, rejects: Rejects) -> Tree:
        """The candidates. Raises Refused where the devices together hold less than the model."""
        plain = plain_candidate(self.cfg, self.world)
        blueprint = predictor.blueprint(plain.config(self.cfg))
        load = step_load(predictor, blueprint)
        pieces = Pieces(blueprint, load, self.hardware, blueprint.node_size)
        check_room(pieces.weights.states(), self.world, self.hardware)
        room = self.hardware.memory.bytes - self.hardware.memory.reserved
        host = self.hardware.host
        cores = math.inf if host is None else host.cores
        return Tree(space_of(blueprint), pieces, room, cores, rejects.dropped)

    def _judge(self, search: Search[Node]) -> Callable[[Node], Judged]:
        def judge(leaf: Node) -> Judged:
            search.cost_once(leaf)
            return self.judged[leaf]

        return judge

    def _search(
        self, finder: Finder, search: Search[Node], every: Sequence[Goal], rejects: Rejects, start: float
    ) -> tuple[dict[str, tuple[Judged, ...]], dict[str, Proof]]:
        """Find and prove, in one go; in goes of twice the time where less than a whole proof is asked for."""
        for share in (1 / 8, 1 / 4, 1 / 2, 1.0) if self.within else (1.0,):
            self._find(finder, every, start + share * FINDING * self.limit)
            end = start + share * (1 - SHARE) * self.limit
            found, proofs = self._prove(search, list(finder.roots), every, rejects, end)
            if proofs["best"].proved or proofs["best"].within(found["best"], self.within):
                break
        return found, proofs

    def _know(self, tree: Tree, last: Found) -> None:
        """Have candidates of the space that polishing has found held against their bounds, as all others."""
        known = {j.candidate for j in self.judged.values()}
        for judged in (j for every in last.values() for j in every):
            of = judged.candidate
            if of not in known and not of.unsearched:
                frames = [f for f in tree.space.frames if f.sink == of.sink.block]
                leaf = next((leaf for f in frames if (leaf := tree.leaf(f, of)) is not None), None)
                if leaf is not None:
                    self.judged[leaf] = judged

    def _prove(
        self, search: Search[Node], roots: list[Node], every: Sequence[Goal], rejects: Rejects, end: float
    ) -> tuple[dict[str, tuple[Judged, ...]], dict[str, Proof]]:
        """Best first, for each goal: what is found, and what is known of what is left."""
        found, proofs = dict[str, tuple[Judged, ...]](), dict[str, Proof]()
        for i, goal in enumerate(every):
            # The main goal may take half of the time, each other an even share of what is left.
            left = end - time.process_time()
            until = time.process_time() + left * (0.5 if i == 0 else 1 / (len(every) - i))
            self._goal = goal.name
            keep = self._keeps(goal)
            enough = near_enough(search, goal.k, keep, self.within)
            result = search.best(roots, goal.k, keep=keep, stop=_after(until), enough=enough)
            found[goal.name] = tuple(self.judged[leaf] for _, leaf in result.best)
            proofs[goal.name] = Proof(result.proved, result.least)
            if i == 0:
                rejects.left(result.left, found[goal.name])
        # Where a search was stopped, or a bound was too high, what was found and opened beside it counts too.
        for goal in every:
            keep = self._keeps(goal)
            best = search.best_known(goal.k, keep)
            found[goal.name] = tuple(self.judged[leaf] for _, leaf in best)
            if not proofs[goal.name].proved:
                least = search.least(roots, keep)
                proofs[goal.name] = Proof(len(best) == goal.k and best[-1][0] <= least, least)
        return found, proofs

    def _find(self, finder: Finder, every: Sequence[Goal], end: float) -> None:
        """Predict good candidates for each goal: those of one layout for all modules first, as the others
        start from what is found."""
        # What placements have shown is tried for all modules alike too: the baseline is tuned as hard.
        alike = [goal for goal in every if goal.keep is homogeneous]
        order = [*alike, *(goal for goal in every[1:] if goal not in alike), *alike, every[0]]
        weights = [
            2 * order[0].weight,
            *(goal.weight for goal in order[1:]),
        ]  # others start from what the first finds
        for i, goal in enumerate(order):
            left = max(0.0, end - time.process_time())
            share = weights[i] / sum(weights[i:])
            self._goal = goal.name
            finder.find(goal, time.process_time() + left * share)

    def _keeps(self, goal: Goal) -> Callable[[Node], bool]:
        reserved = self.hardware.memory.reserved

        def keep(node: Node) -> bool:
            judged = self.judged.get(node)
            fits = node.bytes + reserved if judged is None else judged.bytes
            return fits <= goal.limit and goal.keep(node)

        return keep

    def _above(self, search: Search[Node], roots: Sequence[Node]) -> float:
        """The largest share of a prediction that fits that the bound of a branch above it was."""
        out = 0.0
        for leaf, judged in self.judged.items():
            if judged.why is None:
                above = [b.bound / judged.step_s for b in branches_above(search, roots, leaf)]
                out = max([out, *above])
        return out

    def _nearest(self, tree: Tree, found: Mapping[str, Sequence[Judged]]) -> float:
        """The largest share of a prediction that its bound was, of those that have one and of all found."""
        best = {j.candidate for every in found.values() for j in every}
        out, reserved = 0.0, self.hardware.memory.reserved
        for node, judged in self.judged.items():
            prediction = judged.prediction
            if prediction is None or not (node.bound or judged.candidate in best):
                continue
            known = node if node.bound else tree.bounded(node)
            out = max(out, known.bound / prediction.step_s)
            out = max(out, (known.bytes + reserved) / prediction.peak_memory_bytes)
        return out


def branches_above(search: Search[Node], roots: Sequence[Node], leaf: Node) -> Iterator[Node]:
    """The branches above a leaf, as far as they were opened."""
    level = roots
    while (node := next((b for b in level if b.key == leaf.key[: len(b.key)]), None)) is not None:
        yield node
        level = search.opened.get(node, ())


def near_enough(
    search: Search[B], k: int, keep: Callable[[B], bool], share: float
) -> Callable[[float], bool]:
    """Whether k leaves are known to which those left, by their least bound, come no nearer than a share."""

    def enough(least: float) -> bool:
        best = search.best_known(k, keep) if share else []
        return len(best) == k and best[-1][0] <= (1 + share) * least

    return enough


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
