"""Computations on sizes in place of tensors, with their backward: what is computed, sent and held.

A layer that is written with these operations as it is written with torch's holds memory as long as that does:
a Storage counts from when it is made until nothing refers to it. Operations keep what torch's keep for their
backward, which runs in the order of torch's engine. So what a layer keeps, and the most that it needs, is no
formula of its own but follows from the same code, in a thousandth of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mm.predict.work import Class, Kernel, Message, Work
from parallel.schedule.action import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Kind
from parallel.sharding.low_rank import matching
from parallel.topology.groups import Group

NAMES = {2: "bfloat16", 4: "float32", 8: "float64"}
KEPT, PASSING, GRADIENTS = range(3)  # what storages are for: made in a forward, in a backward, of weights


class Storage:
    """Memory of so many bytes; it is freed when nothing refers to it."""

    __slots__ = ("__weakref__", "_tape", "size", "what")

    def __init__(self, tape: Tape, size: float, what: int) -> None:
        self._tape, self.size, self.what = tape, size, what
        live = tape.live
        live[what] += size
        if sum(live) > tape.peak:
            tape.peak, tape.at = sum(live), (live[0], live[1], live[2])
        passing = live[1] + size if what == GRADIENTS else live[1]
        if live[0] + passing > tape.most:
            tape.most, tape.at_most = live[0] + passing, (live[0], passing)

    def __del__(self) -> None:
        self._tape.live[self.what] -= self.size


class Var:
    """A tensor [rows, width] of `item` bytes an element. store: its memory, which views share. edge: the node
    that made it and which of its results it is; None where no gradient is wanted."""

    __slots__ = ("edge", "item", "rows", "store", "width")

    def __init__(
        self, store: Storage, rows: float, width: float, item: int, edge: tuple[Node, int] | None = None
    ) -> None:
        self.store, self.rows, self.width, self.item, self.edge = store, rows, width, item, edge

    @property
    def n(self) -> float:
        """Elements."""
        return self.rows * self.width

    @property
    def bytes(self) -> float:
        """Of its elements; a view's storage may have more."""
        return self.rows * self.width * self.item

    def view(self, rows: float, width: float) -> Var:
        """The same memory in other dims."""
        return Var(self.store, rows, width, self.item, self.edge)


Grads = Sequence[Storage | None]
Back = Callable[[list[Storage | None]], Grads]  # gradients of results to gradients of inputs


class Node:
    """An operation that has a backward. inputs: the edges of its inputs. saved: what it keeps."""

    __slots__ = ("back", "inputs", "results", "saved")

    def __init__(
        self, inputs: tuple[tuple[Node, int] | None, ...], back: Back | None, results: int, saved: Saved
    ) -> None:
        self.inputs, self.back, self.results, self.saved = inputs, back, results, saved


class Again:
    """A part that is computed again. saves: how many storages its nodes keep. kept: these, once there."""

    def __init__(self) -> None:
        self.saves = 0
        self.kept: list[Storage | None] | None = None
        self.compute: Callable[[], object] | None = None


class Slots(NamedTuple):
    """Storages of a part that is computed again: the numbers of the first and after the last."""

    of: Again
    first: int
    stop: int


Saved = list[Storage] | Slots


class _EnoughError(Exception):
    """All that a backward needs has been computed again."""


class Low(NamedTuple):
    """Low-rank adapters (parallel.sharding.low_rank). targets: names of linear maps, or ALL."""

    rank: int
    targets: tuple[str, ...]

    def on(self, name: str) -> bool:
        """Whether a linear map has one."""
        return any(matching([name], self.targets).values())


class Tally:
    """Kernels and messages, by class: how many."""

    def __init__(self) -> None:
        self.kernels: Counter[tuple[Class, tuple[float, ...], int, float, float]] = Counter()
        self.messages: Counter[tuple[str, Group, float]] = Counter()
        self.memory = [0.0, 0]  # bytes, how many

    def work(self) -> Work:
        """The same as data."""
        kernels = [
            Kernel(kind, tuple(map(int, shape)), NAMES[item], flops, size, times)
            for (kind, shape, item, flops, size), times in self.kernels.items()
        ]
        if self.memory[1]:
            size, times = self.memory
            kernels.append(Kernel("memory", (), "", 0.0, size / times, times))
        messages = [Message(op, group, size, times) for (op, group, size), times in self.messages.items()]
        return Work(tuple(kernels), tuple(messages))


class Tape:
    """Records one computation.

    item: bytes of an element in the dtype of computation, acc: in that of sums. halves: whether the gradients
    of weights are computed after all others, from factors that are kept. trains: whether weights have any.
    low: adapters of linear maps, which are trained in any case.
    host: whether cores compute, which have kernels for the slope of SiLU and for attention with logarithms,
    and less memory for blocks of scans.
    live: bytes now, by what they are for. peak: the most there have been since forget(), and at: by what.
    """

    def __init__(
        self,
        item: int,
        *,
        halves: bool = False,
        trains: bool = True,
        low: Low | None = None,
        host: bool = False,
    ) -> None:
        self.host = host
        self.item, self.acc, self.halves, self.trains = item, max(4, item), halves, trains
        self.low = low
        self.live = [0.0, 0.0, 0.0]
        self.peak, self.at = 0.0, (0.0, 0.0, 0.0)
        self.most, self.at_most = 0.0, (0.0, 0.0)  # without gradients of weights but the one that comes
        self.nodes: list[Node] = []
        self.tallies = {kind: Tally() for kind in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)}
        self.kind: Kind = FORWARD
        self.what = KEPT
        self.weights: dict[str, Storage] = {}  # gradients, by name
        self.experts, self.at_experts = (
            0.0,
            (0.0, 0.0, 0.0),
        )  # of theirs, and what was live when they were there
        self.later: list[tuple[Storage | None, ...]] = []  # factors of products that wait
        self.kept_rows: list[Storage] = []  # gradients of rows that entered
        self._again: Again | None = None
        self._replayed: Again | None = None

    def forget(self) -> None:
        """Look for a new peak."""
        live = self.live
        self.peak, self.at = sum(live), (live[0], live[1], live[2])
        self.most, self.at_most = live[0] + live[1], (live[0], live[1])

    def new(self, n: float, item: int) -> Storage:
        """Memory of n elements."""
        return Storage(self, n * item, self.what)

    def var(self, rows: float, width: float, item: int | None = None) -> Var:
        """A tensor without a gradient."""
        item = self.item if item is None else item
        return Var(self.new(rows * width, item), rows, width, item)

    # What is counted.

    def moves(self, *sizes: float) -> None:
        """A kernel that reads and writes these bytes, and multiplies no matrices."""
        memory = self.tallies[self.kind].memory
        memory[0] += sum(sizes)
        memory[1] += 1

    def product(self, m: float, n: float, k: float, item: int, batch: float = 1) -> None:
        """A product [m, k] x [k, n], or a batch of them."""
        if m * n * k * batch == 0:
            return
        size = batch * (m * k + k * n + m * n) * item
        key = ("product", (m * batch, n, k), item, 2.0 * batch * m * n * k, size)
        self.tallies[self.kind].kernels[key] += 1  # type: ignore[index]

    def kernel(self, kind: Class, shape: tuple[float, ...], item: int, flops: float, size: float) -> None:
        """Another kernel."""
        self.tallies[self.kind].kernels[kind, shape, item, flops, size] += 1

    def message(self, op: str, group: Group, size: float) -> None:
        """A collective or message of this rank; size: bytes of its larger side."""
        self.tallies[self.kind].messages[op, group, size] += 1

    # Operations.

    def save(self, *stores: Storage | None) -> Saved:
        """Keep these for a backward."""
        found = [s for s in stores if s is not None]
        again = self._replayed
        if again is not None:
            assert again.kept is not None
            again.kept += found
            if len(again.kept) >= again.saves:
                raise _EnoughError
            return []
        if self._again is not None:
            first = self._again.saves
            self._again.saves += len(found)
            return Slots(self._again, first, self._again.saves)
        return found

    def save_made(self, saved: Saved, *stores: Storage) -> Saved:
        """Keep results too, after what save() has kept of the same operation."""
        if isinstance(saved, Slots) or self._replayed is not None:
            more = self.save(*stores)
            return more if isinstance(saved, list) else Slots(saved.of, saved.first, self._saves())
        saved += stores
        return saved

    def _saves(self) -> int:
        assert self._again is not None
        return self._again.saves

    def node(
        self,
        inputs: Iterable[Var],
        back: Back,
        saved: Saved,
        results: int = 1,
        *,
        weights: bool = False,
        learns: bool = False,
    ) -> Node | None:
        """The node of an operation; None where it passes no gradient on. weights: whether it has some.
        learns: whether it has a gradient to make whatever `trains` says."""
        edges = tuple(x.edge for x in inputs)
        if not learns and not (weights and self.trains) and not any(edges):
            return None
        made = Node(edges, back, results, saved)
        if self._replayed is not None:
            return made  # those of the first time have the edges
        self.nodes.append(made)
        return made

    def leaf(self, x: Var) -> Node:
        """Have a gradient of x."""
        made = Node((), None, 1, [])
        self.nodes.append(made)
        x.edge = (made, 0)
        return made

    def result(self, node: Node | None, store: Storage, rows: float, width: float, item: int) -> Var:
        """The first result of an operation."""
        return Var(store, rows, width, item, None if node is None else (node, 0))

    def gradient(
        self, name: str, n: float, item: int, *, expert: bool = False, adapter: bool = False
    ) -> None:
        """The gradient of a weight, which is added to what is there."""
        if not (self.trains or adapter):
            return
        made = Storage(self, n * item, GRADIENTS)
        if name in self.weights:
            self.moves(3 * n * item)
        else:
            self.weights[name] = made
        if expert:
            self.experts += n * item
            self.at_experts = (self.live[0], self.live[1], self.live[2])

    # Running.

    def again(self, wanted: bool, fn: Callable[..., Var], *args: Any) -> Var:
        """fn(*args), of which only the arguments are kept where it is wanted, and which then runs again."""
        learns = self.trains or self.low is not None or any(isinstance(a, Var) and a.edge for a in args)
        if not (wanted and learns) or self._again is not None or self._replayed is not None:
            return fn(*args)
        part = Again()
        part.compute = lambda: fn(*args)
        self._again = part
        try:
            return fn(*args)
        finally:
            self._again = None

    def backward(self, root: Var, grad: Storage) -> dict[int, Storage]:
        """Run the backward from `root`; gradients of leaves, by the node's id."""
        assert root.edge is not None
        self.kind, self.what = BACKWARD_INPUT, PASSING
        found: dict[int, list[Storage | None]] = {id(root.edge[0]): [None] * root.edge[0].results}
        found[id(root.edge[0])][root.edge[1]] = grad
        del grad
        leaves: dict[int, Storage] = {}
        while self.nodes:
            node = self.nodes.pop()
            grads = found.pop(id(node), None)
            if grads is None:
                self._release(node)
                continue
            if node.back is None:
                assert grads[0] is not None
                leaves[id(node)] = grads[0]
                continue
            self._unpack(node.saved)
            outs = list(node.back(grads))
            del grads
            self._release(node)
            for edge, out in zip(node.inputs, outs, strict=True):
                if edge is not None and out is not None:
                    self._add(found, edge, out)
            outs.clear()
            out = None
        return leaves

    def _add(self, found: dict[int, list[Storage | None]], edge: tuple[Node, int], out: Storage) -> None:
        node, slot = edge
        grads = found.setdefault(id(node), [None] * node.results)
        old = grads[slot]
        if old is None:
            grads[slot] = out
        else:
            self.moves(3 * max(out.size, old.size))
            grads[slot] = Storage(self, max(out.size, old.size), PASSING)

    def _unpack(self, saved: Saved) -> None:
        """Compute a part again, where what a node needs is of one."""
        if isinstance(saved, list) or saved.of.kept is not None or saved.first == saved.stop:
            return
        part = saved.of
        part.kept = []
        assert part.compute is not None
        self._replayed = part
        try:
            part.compute()
        except _EnoughError:
            pass
        finally:
            self._replayed = None

    @staticmethod
    def _release(node: Node) -> None:
        saved, node.saved = node.saved, []
        if isinstance(saved, list):
            saved.clear()  # the operation may refer to it
        elif saved.of.kept is not None:
            saved.of.kept[saved.first : saved.stop] = [None] * (saved.stop - saved.first)
