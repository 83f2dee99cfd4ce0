"""The candidates as a tree, each branch with a bound: placement, the language model's degrees, micro-batches
and recomputation, its schedule and policy, then one encoder after another. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mm.config.outline import SINK
from mm.search.bound import Demand, Floor, Open, Others, Placed, bytes_bound, floor_bound, seconds_bound
from mm.search.candidate import Block, Candidate, Choice, Degrees
from mm.search.space import FIRST, Frame, Space

Again = tuple[str, ...]


class Asked(Protocol):
    """What candidates cost, in pieces. Tests give another one than mm.search.pieces."""

    def least(self, module: str, size: int, degrees: Degrees | None) -> float:
        """Seconds that each of `size` ranks needs at least for a module, whatever else is decided."""

    def demand(
        self, module: str, choice: Choice, microbatches: int, again: Again, kind: str
    ) -> Demand | None:
        """What a module asks of its ranks at least; None where it cannot be so."""

    def floors(
        self, block: Block, degrees: Degrees, policies: Sequence[str], numbers: Sequence[int], again: Again
    ) -> Sequence[Sequence[Floor]]:
        """What the language model asks at least, by number of micro-batches, then of each policy that can be
        so; quick to tell."""

    def options(
        self, module: str, block: Block, degrees: Sequence[Degrees], m: int, again: Again
    ) -> Open | None:
        """The least that any of an encoder's degrees on a block asks; None where it has none."""


@dataclass(frozen=True)
class Node:
    """A branch, or a candidate where all is decided. What is not decided yet is None.

    key: where it is in the tree. bound: seconds. bytes: of the fullest rank, at least. size: candidates.
    """

    key: tuple[int, ...]
    frame: Frame = field(compare=False)
    bound: float = field(compare=False)
    size: int = field(compare=False)
    bytes: float = field(compare=False, default=0.0)
    degrees: Degrees | None = field(compare=False, default=None)
    microbatches: int = field(compare=False, default=0)
    again: Again = field(compare=False, default=())
    kind: str = field(compare=False, default="")
    sink: Choice | None = field(compare=False, default=None)
    encoders: tuple[Choice, ...] = field(compare=False, default=())

    @property
    def leaf(self) -> bool:
        """Whether it is a candidate."""
        return self.sink is not None and len(self.encoders) == len(self.frame.encoders)


@dataclass
class Tree:
    """The tree of a space. limit: bytes of a device; branches that need more have no bound (math.inf).
    cores: that all ranks share.

    drop: told of each branch that cannot be: its bytes are above the limit, or no schedule has it.
    """

    space: Space
    asked: Asked
    limit: float
    cores: float = math.inf
    drop: Callable[[Node], object] = lambda node: None
    _known: dict[tuple[str, Block, int | None], tuple[Choice, ...]] = field(default_factory=dict)
    _groups: dict[Block, list[tuple[Degrees, int]]] = field(default_factory=dict)
    _least: dict[tuple[object, ...], Open | None] = field(default_factory=dict)

    def roots(self) -> Iterator[Node]:
        """A branch for each placement."""
        for i, frame in enumerate(self.space.frames):
            size = sum(n * self._size(frame, d) for d, n in self._alike(frame))
            if size:
                yield Node((i,), frame, self._idle(frame, None), size)

    def expand(self, node: Node) -> Iterator[Node]:
        """The branches of a branch."""
        if node.degrees is None:
            made = self._by_degrees(node)
        elif not node.microbatches:
            made = self._by_microbatches(node)
        elif node.sink is None:
            made = self._by_policy(node)
        else:
            made = self._by_encoder(node)
        for below in made:
            if below.bound < math.inf and below.bytes > self.limit:
                below = replace(below, bound=math.inf)
            if below.bound == math.inf:
                self.drop(below)
            yield below

    def candidate(self, leaf: Node) -> Candidate:
        """The candidate that a leaf is."""
        assert leaf.leaf and leaf.sink is not None
        names = [*self.space.encoders, SINK]
        choices = tuple(zip(names, [*leaf.encoders, leaf.sink], strict=True))
        return Candidate(self.space.world, choices, leaf.kind, leaf.microbatches, leaf.again)

    def leaf(self, frame: Frame, of: Candidate) -> Node | None:
        """A candidate as its leaf, without bounds; None where it is not in the space."""
        sink = of.sink
        start = Node((), frame, 0.0, 1, degrees=sink.degrees)
        encoders = tuple(c for m, c in of.choices if m != SINK)
        numbers = self.space.microbatches(sink.dp, sink.degrees.pp)
        try:
            key = (
                self.space.frames.index(frame),
                self._degrees(frame).index(sink.degrees),
                numbers.index(of.microbatches),
                self.space.recompute.index(of.recompute),
                self.space.kinds(frame, sink.degrees).index(of.kind),
                self.space.policies(sink.block, sink.degrees).index(sink.data_parallel),
                *(
                    self._choices(start, m, of.kind).index(c)
                    for m, c in zip(self.space.encoders, encoders, strict=True)
                ),
            )
        except ValueError:
            return None
        start = replace(start, microbatches=of.microbatches, again=of.recompute, kind=of.kind)
        return replace(start, key=key, sink=sink, encoders=encoders)

    def bounded(self, leaf: Node) -> Node:
        """A leaf with its bounds."""
        return self._bounded(leaf, leaf)

    def _degrees(self, frame: Frame) -> list[Degrees]:
        found = self.space.sink_degrees(frame.sink.size)
        return [d for d in found if d.pp > 1 or FIRST not in frame.encoders]

    def _alike(self, frame: Frame) -> list[tuple[Degrees, int]]:
        """Degrees of which so many have equally many candidates below."""
        if frame.sink not in self._groups:
            found: dict[tuple[object, ...], list[Degrees]] = {}
            for d in self.space.sink_degrees(frame.sink.size):
                policies = self.space.policies(frame.sink, d)
                found.setdefault((d.model, d.pp, d.vpp > 1, policies), []).append(d)
            self._groups[frame.sink] = [(same[0], len(same)) for same in found.values()]
        return [(d, n) for d, n in self._groups[frame.sink] if d.pp > 1 or FIRST not in frame.encoders]

    def _by_degrees(self, node: Node) -> Iterator[Node]:
        for i, degrees in enumerate(self._degrees(node.frame)):
            size = self._size(node.frame, degrees)
            bound = max(node.bound, self._idle(node.frame, degrees))
            yield replace(node, key=(*node.key, i), bound=bound, size=size, degrees=degrees)

    def _by_microbatches(self, node: Node) -> Iterator[Node]:
        """Schedules and policies are bounded together here, by what is quick to tell."""
        assert node.degrees is not None
        sink, degrees = node.frame.sink, node.degrees
        numbers = self.space.microbatches(degrees.dp(sink.size), degrees.pp)
        policies = self.space.policies(sink, degrees)
        size = node.size // (len(numbers) * len(self.space.recompute))
        first = self.space.block(FIRST, sink, degrees)
        for j, again in enumerate(self.space.recompute):
            found = self.asked.floors(sink, degrees, policies, numbers, again)
            for i, m in enumerate(numbers):
                made = replace(node, key=(*node.key, i, j), microbatches=m, again=again, size=size)
                undecided = [self._undecided(made, module) for module in self.space.encoders]
                known = [u for u in undecided if u is not None]
                if not found[i] or len(known) < len(undecided):
                    yield replace(made, bound=math.inf)
                    continue
                others = Others.of(sink, first, known)
                seconds, held = zip(*(floor_bound(f, others, self.cores) for f in found[i]), strict=True)
                yield replace(made, bound=max(node.bound, min(seconds)), bytes=max(node.bytes, min(held)))

    def _policies(self, node: Node) -> Iterator[Node]:
        """The schedules and policies below a node."""
        assert node.degrees is not None
        block = node.frame.sink
        for i, kind in enumerate(self.space.kinds(node.frame, node.degrees)):
            for j, policy in enumerate(self.space.policies(block, node.degrees)):
                sink = Choice(block, node.degrees, policy)
                yield replace(node, key=(*node.key, i, j), kind=kind, sink=sink)

    def _by_policy(self, node: Node) -> Iterator[Node]:
        for made in self._policies(node):
            size = math.prod(self._options(node, m, made.kind) for m in self.space.encoders)
            yield self._bounded(replace(made, size=size), node)

    def _by_encoder(self, node: Node) -> Iterator[Node]:
        module = list(self.space.encoders)[len(node.encoders)]
        choices = self._choices(node, module, node.kind)
        for i, choice in enumerate(choices):
            made = replace(
                node,
                key=(*node.key, i),
                size=node.size // len(choices),
                encoders=(*node.encoders, choice),
            )
            yield self._bounded(made, node)

    def _bounded(self, node: Node, above: Node) -> Node:
        """The node with its bounds, from what is decided and the least of what is not."""
        assert node.sink is not None
        m, again, kind = node.microbatches, node.again, node.kind
        names = list(self.space.encoders)
        chosen = [(SINK, node.sink), *zip(names, node.encoders, strict=False)]
        placed = []
        for module, choice in chosen:
            demand = self.asked.demand(module, choice, m, again, kind)
            if demand is None:
                return replace(node, bound=math.inf)
            placed.append(Placed(demand, choice.block))
        undecided = []
        for module in names[len(node.encoders) :]:
            least = self._undecided(node, module)
            if least is None:
                return replace(node, bound=math.inf)
            undecided.append(least)
        seconds = seconds_bound(placed[0], placed[1:], undecided, m, self.cores)
        held = bytes_bound(placed[0], placed[1:], undecided, kind, m)
        return replace(node, bound=max(above.bound, seconds), bytes=max(above.bytes, held))

    def _undecided(self, node: Node, module: str) -> Open | None:
        """The least that any layout of an encoder asks; None where it has none."""
        block = self._block(node, module)
        key = (module, block.size, node.microbatches, node.again)
        if key not in self._least:
            degrees = self.space.encoder_degrees(module, block.size)
            self._least[key] = self.asked.options(module, block, degrees, node.microbatches, node.again)
        least = self._least[key]
        return None if least is None else least._replace(block=block)

    def _idle(self, frame: Frame, degrees: Degrees | None) -> float:
        """Seconds of a placement before micro-batches are decided."""
        sink = frame.sink
        total = {sink: self.asked.least(SINK, sink.size, degrees)}
        for module, where in zip(self.space.encoders, frame.encoders, strict=True):
            if where == FIRST and degrees is None:
                continue  # its block follows from pp; it is bounded then
            block = self.space.block(where, sink, degrees or Degrees())
            total[block] = total.get(block, 0.0) + self.asked.least(module, block.size, None)
        return max(total.values())

    def _size(self, frame: Frame, degrees: Degrees) -> int:
        """Candidates below some degrees of the language model."""
        numbers = len(self.space.microbatches(degrees.dp(frame.sink.size), degrees.pp)) * len(
            self.space.recompute
        )
        policies = len(self.space.policies(frame.sink, degrees))
        node = Node((), frame, 0.0, 0, degrees=degrees)
        kinds = self.space.kinds(frame, degrees)
        every = [math.prod(self._options(node, m, kind) for m in self.space.encoders) for kind in kinds]
        return numbers * policies * sum(every)

    def _options(self, node: Node, module: str, kind: str) -> int:
        return len(self._choices(node, module, kind))

    def _choices(self, node: Node, module: str, kind: str) -> Sequence[Choice]:
        block, stage = self._block(node, module), self._stage(node, module) if kind == "fill" else None
        key = module, block, stage
        if key not in self._known:
            self._known[key] = self.space.choices(module, block, stage)
        return self._known[key]

    def _where(self, node: Node, module: str) -> Block | str:
        return node.frame.encoders[list(self.space.encoders).index(module)]

    def _block(self, node: Node, module: str) -> Block:
        assert node.degrees is not None
        return self.space.block(self._where(node, module), node.frame.sink, node.degrees)

    def _stage(self, node: Node, module: str) -> int | None:
        assert node.degrees is not None
        own = isinstance(self._where(node, module), Block)
        return None if own else node.frame.sink.size // node.degrees.pp
