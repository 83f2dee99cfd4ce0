"""What a search left out, and why, with numbers: in groups, as there are millions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mm.predict.hardware import Hardware
from mm.search.predictor import Judged
from mm.search.tree import Node

MOST = 40  # groups that are told


@dataclass(frozen=True)
class Rejected:
    """Candidates that were left out for one reason. layout: what they have in common. count: how many."""

    layout: str
    why: str
    count: int


@dataclass
class _Group:
    count: int = 0
    least: float = float("inf")


@dataclass
class Rejects:
    """Collects them. reserved bytes count: what is told is what a device needs."""

    hardware: Hardware
    _memory: dict[str, _Group] = field(default_factory=dict)
    _slow: dict[str, _Group] = field(default_factory=dict)
    _other: list[Rejected] = field(default_factory=list)
    _seen: set[tuple[int, ...]] = field(default_factory=set)
    _fastest: float = float("inf")

    def dropped(self, node: Node) -> None:
        """A branch that needs more memory than there is, or that has no schedule."""
        if node.key not in self._seen and node.bytes:
            self._seen.add(node.key)
            _add(self._memory, _common(node), node.size, node.bytes + self.hardware.memory.reserved)

    def judged(self, judged: Judged) -> None:
        """A candidate that was predicted and does not fit."""
        if judged.why is not None:
            self._other.append(Rejected(judged.candidate.describe(), judged.why, 1))

    def left(self, nodes: Iterable[Node], best: Sequence[Judged]) -> None:
        """Branches that were not opened, as what was found is faster than their bounds: the last told."""
        self._slow.clear()
        if best:
            self._fastest = best[-1].step_s
        for node in nodes:
            _add(self._slow, _common(node), node.size, node.bound)

    def grouped(self) -> tuple[Rejected, ...]:
        """By group, those with most candidates first."""
        there = self.hardware.memory.bytes / 1e9
        found = [
            Rejected(what, f"needs at least {g.least / 1e9:.1f} GB; a device has {there:.1f} GB", g.count)
            for what, g in self._memory.items()
        ]
        for what, g in self._slow.items():
            slower = g.least > self._fastest
            why = f"takes at least {g.least:.4g} s"
            why += f"; the last of the best takes {self._fastest:.4g} s" if slower else ": not looked into"
            found.append(Rejected(what, why, g.count))
        found.sort(key=lambda r: -r.count)
        return tuple([*found[:MOST], *self._other[:MOST]])

    def nothing(self, world: int, *, search_ended: bool) -> str:
        """Why no candidate at all fits."""
        there, name = self.hardware.memory.bytes, self.hardware.name
        head = f"no layout on {world} {name} fits"
        if not search_ended:
            head = f"no layout on {world} {name} was found in time"
        least = min(((g.least, what) for what, g in self._memory.items()), default=None)
        text = head
        if least is not None:
            text += (
                f": of those not predicted the smallest needs at least {least[0] / 1e9:.1f} GB a device "
                f"({least[1]}), there are {there / 1e9:.1f} GB"
            )
        if self._other:
            text += f"; of those predicted {self._other[0].layout}: {self._other[0].why}"
        return (
            f"{text}; what would fit: more devices, a smaller train.global_batch or data.context, or "
            "train.shard=layer"
        )


def _add(groups: dict[str, _Group], what: str, count: int, value: float) -> None:
    group = groups.setdefault(what, _Group())
    group.count += count
    group.least = min(group.least, value)


def _common(node: Node) -> str:
    """What candidates of a branch have in common: the placement and the language model's main degrees."""
    d = node.degrees
    if d is None:
        return f"{node.frame.placement}, llm on {node.frame.sink.size} ranks"
    parts = [f"{a}{n}" for a in ("tp", "pp", "ep") if (n := getattr(d, a)) > 1]
    again = f", recompute {'+'.join(node.again)}" if node.again else ""
    return f"{node.frame.placement}, llm {' '.join(parts) or 'data parallel'}{again}"
