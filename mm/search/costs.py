"""Costs of parts of modules: counted pieces, priced where their groups are at best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mm.config.outline import SINK
from mm.plan.blueprint import Blueprint
from mm.predict.count.job import low_of
from mm.predict.count.pieces import How, Piece
from mm.predict.hardware import Hardware
from mm.predict.links import Place, Places, message_seconds
from mm.predict.price import price
from mm.predict.work import Message
from mm.search.candidate import Choice, Degrees
from parallel.topology.groups import Group, GroupPlan

Again = tuple[str, ...]


class Cost(NamedTuple):
    """A part of a stage in a micro-batch. forward, early, late: seconds of its forward and of both halves of
    its backward that grow with the load. launched, relaunched: those of its forward and backward that do not.
    kept: bytes between them. flops: of its forward. out: bytes that it gives."""

    forward: float = 0.0
    early: float = 0.0
    late: float = 0.0
    launched: float = 0.0
    relaunched: float = 0.0
    kept: float = 0.0
    flops: float = 0.0
    out: float = 0.0

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        """With another part, so many times."""
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))

    def scaled(self, by: float) -> Cost:
        """A part of another load."""
        return Cost(*(by * a for a in self))

    def with_launches(self) -> Cost:
        """All seconds in the parts of the micro-batch."""
        return self._replace(forward=self.forward + self.launched, early=self.early + self.relaunched)

    @property
    def seconds(self) -> float:
        """That grow with the load."""
        return self.forward + self.early + self.late

    @property
    def fixed(self) -> float:
        """Seconds that do not."""
        return self.launched + self.relaunched


class Mean(NamedTuple):
    """A micro-batch of mean load, by stage, launches in its parts. least, most: load of the lightest and of
    the heaviest micro-batch over that, ends: of the first and the last; None where it is not known."""

    stages: Sequence[Cost]
    least: float
    most: float | None
    ends: tuple[float, float] | None = None


class Unit(NamedTuple):
    """By stage, seconds of a unit of load, as Cost has them, and launches of a micro-batch. even: the least
    FLOPs of a unit of load over the most."""

    forward: np.ndarray
    early: np.ndarray
    late: np.ndarray
    launched: np.ndarray
    relaunched: np.ndarray
    even: float


def least_cost(costs: Iterable[Cost]) -> Cost:
    """The least of some costs, one by one."""
    return Cost(*map(min, zip(*costs, strict=True)))


@dataclass
class Priced:
    """What modules share: counts become costs. node: ranks a node."""

    blueprint: Blueprint
    hardware: Hardware
    node: int | None

    def cost(self, piece: Piece, places: Places) -> Cost:
        """What a counted piece costs."""
        works = piece.forward, piece.backward_input, piece.backward_weight
        forward, early, late = (price(work, places, self.hardware) for work in works)
        return Cost(
            forward=forward.seconds - forward.fixed,
            early=early.seconds - early.fixed,
            late=late.seconds - late.fixed,
            launched=forward.fixed,
            relaunched=early.fixed + late.fixed,
            kept=piece.kept,
            flops=piece.forward.flops,
            out=piece.out,
        )

    def how(self, module: str, again: Again) -> How:
        """How a module computes, at least: what enters the first adapted layer may have no gradient, and
        where no module is trained nothing has one."""
        adapters = low_of(self.blueprint, module)
        learns = self.blueprint.frozen < {*self.blueprint.cfg.model, SINK}
        parts = frozenset(again) if module == SINK else frozenset(again) & {"full"}
        return How(
            item=self.blueprint.dtype.itemsize,
            recompute=parts,
            trains=module not in self.blueprint.frozen and adapters is None,
            below=module == SINK and adapters is None and learns,
            low=adapters,
        )

    def places(self, module: str, d: Degrees) -> Places:
        """Where groups of these degrees are, at best: next to each other, with their links for themselves."""
        spans = {"tp": (d.tp, 1), "cp": (d.cp, d.tp), "etp": (d.etp, 1), "ep": (d.ep, d.etp)}
        known = {}
        for axis, (ranks, stride) in spans.items():
            nodes = 1 if self.node is None else min(ranks, -(-ranks * stride // self.node))
            known[Group("module", module, axis)] = Place(ranks, nodes, -(-ranks // nodes))
        return Places(GroupPlan(self.blueprint.world, {}), self.node, known)

    def hop(self, choice: Choice, size: float) -> float:
        """Seconds of hidden states of so many bytes from one pipeline rank to the next."""
        across = self.node is not None and choice.block.size // choice.degrees.pp >= self.node
        if across and self.hardware.links.across is None:
            return 0.0  # no such layout can be predicted
        place = Place(2, 2 if across else 1, 1 if across else 2)
        return message_seconds(Message("send", Group("module", "", "pp"), size), place, self.hardware)
