"""Good candidates first: from sketches that likely fit, one change after another that helps, each predicted
in full. It proves nothing; what it finds is what a search that is stopped has to show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mm.search.candidate import Degrees
from mm.search.goals import Goal, homogeneous
from mm.search.predictor import Judged
from mm.search.sketch import Sketch, far, moves, nearest, sketch_of
from mm.search.space import FIRST, WITH, Frame
from mm.search.tree import Node, Tree

TRIED = 24  # starts that are predicted
FURTHER = 0.15  # of the time, that a factor of two in the language model's degrees is taken to cost
SINKS = 2  # of the language model's layouts so far with which they are tried, on all ranks and on fewer
STARTS = 3  # climbs of a goal
DEEP = 8  # most pipeline ranks of a start
Score = tuple[int, float]  # 0 and seconds; 1 and bytes of what does not fit; 2 of what cannot be
NEVER: Score = (2, math.inf)


@dataclass
class Finder:
    """roots: placements with their bounds. judge: predicts a leaf. seen: what was predicted, by leaf."""

    tree: Tree
    roots: Sequence[Node]
    judge: Callable[[Node], Judged]
    seen: dict[Node, Judged] = field(default_factory=dict)

    def find(self, goal: Goal, until: float) -> None:
        """Predict candidates for a goal until no single change of the best of them helps, or a processor time
        is reached."""
        starts = list[tuple[Score, Sketch]]()
        for sketch in self._starts(goal):
            if time.process_time() > until and any(score[0] == 0 for score, _ in starts):
                break
            starts.append((self._score(sketch, goal), sketch))
        known = [*self._best(goal, 1), *self._best(replace(goal, limit=math.inf), 1)]
        starts += [(self._score(sketch, goal), sketch) for sketch in known]
        starts.sort(key=lambda start: start[0])
        for score, sketch in starts[:STARTS]:
            if score < NEVER:
                self._climb(score, sketch, goal, until)

    def _climb(self, score: Score, sketch: Sketch, goal: Goal, until: float) -> None:
        last = ""
        while time.process_time() < until:
            around = list(moves(self.tree.space, sketch))
            names = [name for name, _ in around]
            at = names.index(last) if last in names else 0  # what helped may help again
            for name, moved in (*around[at:], *around[:at]):
                if time.process_time() > until:
                    return
                found = self._score(moved, goal)
                if found < score:
                    score, last = found, name
                    sketch = self._as_made(moved, goal)
                    break
            else:
                return

    def _score(self, wanted: Sketch, goal: Goal) -> Score:
        """Of the candidate nearest to a sketch."""
        leaf = self._leaf(wanted, goal)
        if leaf is None or not goal.keep(leaf):
            return NEVER
        if leaf not in self.seen:
            self.seen[leaf] = self.judge(leaf)
        return _score(self.seen[leaf], goal)

    def _as_made(self, wanted: Sketch, goal: Goal) -> Sketch:
        leaf = self._leaf(wanted, goal)
        assert leaf is not None
        return sketch_of(leaf.frame, self.tree.candidate(leaf))

    def _leaf(self, wanted: Sketch, goal: Goal) -> Node | None:
        if goal.keep is homogeneous:
            wanted = wanted.follows()
        made = nearest(self.tree.space, wanted)
        return None if made is None else self.tree.leaf(wanted.frame, made)

    def _starts(self, goal: Goal) -> Iterator[Sketch]:
        """Where climbs may start: the language model's layouts on a grid, before there are others; then those
        of the best so far, in placements of low bound where they can stay about as they are."""
        sinks = self._sinks(goal)
        if not sinks:
            yield from self._grid([root.frame for root in self.roots if goal.keep(root)])
            return
        starts = []
        for i, sink in enumerate(sinks):
            for root in self._places(goal):
                wanted = sink._replace(frame=root.frame)
                made = nearest(self.tree.space, wanted)
                if made is not None:
                    by = 1 + FURTHER * far(made.sink.degrees, sink.degrees)
                    starts.append((root.bound * by, i, root.key, wanted))
        starts.sort(key=lambda start: start[:3])
        yield from (start[3] for start in starts[:TRIED])

    def _places(self, goal: Goal) -> list[Node]:
        """Of each number of the language model's ranks, with the same encoders there, that of least bound."""
        found: dict[tuple[object, ...], Node] = {}
        for root in sorted(self.roots, key=lambda r: (r.bound, r.key)):
            if goal.keep(root):
                shared = tuple(w if isinstance(w, str) else "" for w in root.frame.encoders)
                found.setdefault((root.frame.sink.size, shared), root)
        return list(found.values())

    def _sinks(self, goal: Goal) -> list[Sketch]:
        """The best so far that differ in the language model's layout, encoders data parallel: some on all
        ranks, and some on as many as other modules leave."""
        out: dict[tuple[bool, Degrees], Sketch] = {}
        for sketch in self._best(Goal("", 0, goal.limit), None):
            plain = sketch._replace(encoders=tuple((Degrees(), p) for _, p in sketch.encoders))
            everywhere = sketch.frame.sink.size == self.tree.space.world
            if sum(key[0] == everywhere for key in out) < SINKS:
                out.setdefault((everywhere, sketch.degrees), plain)
        return list(out.values())

    def _best(self, goal: Goal, count: int | None) -> list[Sketch]:
        found = [(_score(j, goal), n.key, n) for n, j in self.seen.items() if goal.keep(n)]
        found.sort(key=lambda entry: entry[:2])
        return [sketch_of(n.frame, self.tree.candidate(n)) for s, _, n in found[:count] if s[0] == 0]

    def _grid(self, frames: Sequence[Frame]) -> Iterator[Sketch]:
        """Pipelines of any depth and any tp, experts on one node or on several. Data ranks share the weights,
        and what layers have in parts is computed again: what any model of this size likely needs."""
        space = self.tree.space
        again = max(space.recompute, key=len)
        plain = tuple((Degrees(), "zero3") for _ in space.encoders)
        for pp in space.sink.pp:
            wanted = FIRST if pp > 1 else WITH
            at = next((f for f in frames if set(f.encoders) <= {wanted}), None)
            if at is None or pp > DEEP or at.sink.size % pp:
                continue
            for tp in space.sink.tp:
                for ep in {max((n for n in space.sink.ep if n <= most), default=1) for most in (8, 64)}:
                    d = Degrees(tp, 1, pp, 1, ep, 1, sequence_parallel=tp > 1)
                    yield Sketch(at, d, "zero3", "1f1b", microbatches=4 * pp, again=again, encoders=plain)


def _score(judged: Judged, goal: Goal) -> Score:
    if judged.prediction is None:
        return NEVER
    if judged.why is not None or judged.bytes > goal.limit:
        return 1, judged.bytes
    return 0, judged.step_s


def closest(judged: Mapping[Node, Judged], goal: Goal) -> str | None:
    """Of the candidates of a goal that were predicted and do not fit, what the smallest needs, in words; or
    why the first could not be predicted. None where there is none."""
    mine = [j for n, j in judged.items() if goal.keep(n)]
    sized = [j for j in mine if j.prediction is not None]
    if sized:
        least = min(sized, key=lambda j: j.bytes)
        needs = f"needs {least.bytes / 1e9:.1f} GB a device, and may have {goal.limit / 1e9:.1f}"
        return f"of {len(sized)} predicted the smallest {needs}"
    return mine[0].why if mine else None
