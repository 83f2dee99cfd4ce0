"""Layouts: how one module is cut over its ranks. Pure; no process group, no torch.

Axis order, fastest first: tp, cp, dp, pp in the dense view; etp, ep, edp, pp in the expert view of the same
ranks (parallel folding, arXiv 2504.14960). Only pp must agree between the two views.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

View = Literal["dense", "expert"]
DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp")
AXES: dict[str, tuple[str, ...]] = {"dense": ("tp", "cp", "dp", "pp"), "expert": ("etp", "ep", "edp", "pp")}


class Coord(NamedTuple):
    """Where a rank stands in the dense view."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoord(NamedTuple):
    """Where a rank stands in the expert view."""

    etp: int
    ep: int
    edp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Degrees and placement of one module. Make it with make_layout(), which checks it.

    ranks: the global ranks it lives on, in mesh order. dp and edp follow from the rest.
    """

    module: str
    ranks: tuple[int, ...]
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def dp(self) -> int:
        return self.size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        return self.size // (self.etp * self.ep * self.pp)

    @property
    def token_shards(self) -> int:
        """Into how many shares tp cuts the tokens of one cp rank between blocks."""
        return self.tp if self.sequence_parallel else 1

    def shape(self, view: View = "dense") -> tuple[int, ...]:
        """Sizes of the view's axes, fastest first."""
        return tuple(getattr(self, axis) for axis in AXES[view])

    def _coord(self, rank: int, view: View) -> tuple[int, ...]:
        return self._coord_at(self.ranks.index(rank), view)

    def _coord_at(self, index: int, view: View) -> tuple[int, ...]:
        """Coordinates of the rank at `index` in mesh order."""
        out = []
        for n in self.shape(view):
            out.append(index % n)
            index //= n
        return tuple(out)

    def coord(self, rank: int) -> Coord:
        """Dense coordinates of a global rank of this module."""
        return Coord(*self._coord(rank, "dense"))

    def expert_coord(self, rank: int) -> ExpertCoord:
        """Expert coordinates of a global rank of this module."""
        return ExpertCoord(*self._coord(rank, "expert"))

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The global rank at dense coordinates."""
        return self.ranks[((pp * self.dp + dp) * self.cp + cp) * self.tp + tp]

    def stage_ranks(self, pp: int) -> tuple[int, ...]:
        """The ranks of one pipeline rank, in mesh order."""
        n = self.size // self.pp
        return self.ranks[pp * n : (pp + 1) * n]

    def groups(self, axes: str | tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ only along `axes` (of one view), in rank order."""
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        view: View = "dense" if set(wanted) <= set(AXES["dense"]) else "expert"
        assert set(wanted) <= set(AXES[view]), f"axes {wanted} are not of one view"
        keep = [i for i, axis in enumerate(AXES[view]) if axis not in wanted]
        found: dict[tuple[int, ...], list[int]] = {}
        for index, rank in enumerate(self.ranks):
            coord = self._coord_at(index, view)
            found.setdefault(tuple(coord[i] for i in keep), []).append(rank)
        return tuple(tuple(g) for g in found.values())

    def peers(self, rank: int, axes: str | tuple[str, ...]) -> tuple[int, ...]:
        """The group of `rank` along `axes`."""
        return next(g for g in self.groups(axes) if rank in g)

    def describe(self) -> str:
        """Degrees above one, for tables: "dp4", "tp2 dp2 ep4"."""
        names = [a for a in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp") if getattr(self, a) > 1]
        words = [f"{a}{getattr(self, a)}" for a in names] + (["sp"] if self.sequence_parallel else [])
        return " ".join(words) or "one rank"


def parse_ranks(spec: str | int | Sequence[int], world: int, module: str) -> tuple[int, ...]:
    """Ranks from "all", "a-b", one number or a list; raises ValueError where they do not fit `world`."""
    out = _named_ranks(spec, world)
    if out is None:
        raise ValueError(
            f"layout.{module}.ranks is {spec!r}; needed: all, a number, a-b such as 0-3, or a list of "
            "numbers (ranks count from 0)"
        )
    if not out:
        raise ValueError(f"layout.{module}.ranks {spec!r} names no rank; the job has ranks 0-{world - 1}")
    if len(set(out)) < len(out):
        raise ValueError(
            f"layout.{module}.ranks {list(out)} names a rank twice; nearest: {list(dict.fromkeys(out))}"
        )
    outside = [r for r in out if r >= world]
    if outside:
        raise ValueError(
            f"layout.{module}.ranks {spec!r} needs rank {outside[0]}, but the job has {world} ranks "
            f"(0-{world - 1}); start it with at least {max(out) + 1}, or use ranks: all"
        )
    return out


def _named_ranks(spec: Any, world: int) -> tuple[int, ...] | None:
    """The ranks that `spec` names, in or out of the job; None where it is not a way to name ranks."""
    if spec == "all":
        return tuple(range(world))
    if isinstance(spec, str):
        low, dash, high = (part.strip() for part in spec.partition("-"))
        if not (low.isdecimal() and (high.isdecimal() or not dash)):
            return None
        return tuple(range(int(low), int(high or low) + 1))
    ranks = list(spec) if isinstance(spec, Sequence) else [spec]
    return tuple(ranks) if all(_whole(r) and r >= 0 for r in ranks) else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # YAML's true is no number


def make_layout(module: str, world: int, spec: Mapping[str, Any]) -> Layout:
    """A checked layout of `module` on a job of `world` ranks, from its mapping of layout keys.

    Raises ValueError saying what was given, what is needed and the nearest layout that works.
    """
    known = ("ranks", *DEGREES, "sequence_parallel")
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"unknown key layout.{module}.{key}{hint}")
    ranks = parse_ranks(spec.get("ranks", "all"), world, module)
    degrees = {name: spec.get(name, 1) for name in DEGREES}
    for name, value in degrees.items():
        if not _whole(value) or value < 1:
            raise ValueError(f"layout.{module}.{name} is {value!r}; needed: a whole number of at least 1")
    sp = spec.get("sequence_parallel", False)
    if not isinstance(sp, bool):
        raise ValueError(f"layout.{module}.sequence_parallel is {sp!r}; needed: true or false")
    layout = Layout(module, ranks, **degrees, sequence_parallel=sp)
    for names in (("tp", "cp", "pp"), ("etp", "ep", "pp")):
        product = math.prod(degrees[n] for n in names)
        if layout.size % product:
            given = " x ".join(f"{n}={degrees[n]}" for n in names if degrees[n] > 1)
            raise ValueError(
                f"layout.{module}: {given} needs a multiple of {product} ranks, given {layout.size}; "
                f"nearest: {' or '.join(nearest_degrees(layout.size, degrees))}"
            )
    if layout.vpp > 1 and layout.pp == 1:
        works = " or ".join(nearest_degrees(layout.size, degrees))
        raise ValueError(f"layout.{module}: vpp={layout.vpp} needs pp > 1, given pp=1; nearest: {works}")
    return layout


def nearest_degrees(size: int, given: Mapping[str, int]) -> list[str]:
    """One or two sets of changes that make `given` degrees fit `size` ranks: ["tp=4", "tp=2"].

    Nearest: the fewest degrees changed, then the smallest factors.
    """
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    found = []
    for pp in divisors:
        vpp = given["vpp"] if pp > 1 else 1
        # Given pp, the two views are free of each other: the best two of each are enough.
        for tp, cp in _fitting(divisors, size // pp, given["tp"], given["cp"]):
            for etp, ep in _fitting(divisors, size // pp, given["etp"], given["ep"]):
                works = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
                changed = {n: d for n, d in works.items() if d != given[n]}
                text = ", ".join(f"{n}={d}" for n, d in changed.items())
                found.append((_distance([(d, given[n]) for n, d in changed.items()]), text))
    found.sort()
    return [text for (changes, _), text in found[:2] if changes == found[0][0][0]]


def _fitting(divisors: Sequence[int], n: int, a: int, b: int) -> list[tuple[int, int]]:
    """The two pairs nearest to (a, b) whose product divides n."""
    pairs = [(x, y) for x in divisors for y in divisors if n % (x * y) == 0]
    return sorted(pairs, key=lambda p: _distance([(p[0], a), (p[1], b)]))[:2]


def _distance(moves: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """(how many of the (new, old) degrees differ, by how large factors together, as a logarithm)."""
    return sum(new != old for new, old in moves), sum(abs(math.log(new / old)) for new, old in moves)


def nearest(given: int, n: int) -> list[int]:
    """The divisors of n next below and next above `given` (one of them where it is the only one)."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below = [d for d in divisors if d < given][-1:]
    above = [d for d in divisors if d > given][:1]
    return below + above


def check_divides(what: str, n: int, degree: str, d: int) -> None:
    """Refuse a degree that does not divide a count, naming the nearest degrees that do."""
    if n % d:
        works = " or ".join(f"{degree}={k}" for k in nearest(d, n))
        raise ValueError(f"{what} is {n}, which does not divide by {degree}={d}; nearest: {works}")
