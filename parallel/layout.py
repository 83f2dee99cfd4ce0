"""Layouts: how one module is cut over its ranks. Pure; no process group, no torch.

Axis order, fastest first: tp, cp, dp, pp in the dense view; etp, ep, edp, pp in the expert view of the same
ranks (parallel folding, arXiv 2504.14960). Only pp must agree between the two views.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
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

    def shape(self, view: View = "dense") -> tuple[int, ...]:
        """Sizes of the view's axes, fastest first."""
        return tuple(getattr(self, axis) for axis in AXES[view])

    def _coord(self, rank: int, view: View) -> tuple[int, ...]:
        index, out = self.ranks.index(rank), []
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

    def grid(self, view: View = "dense") -> Any:
        """Global ranks as nested lists, slowest axis first: [pp][dp][cp][tp] or [pp][edp][ep][etp]."""
        ranks: list[Any] = list(self.ranks)
        for n in self.shape(view)[:-1]:
            ranks = [ranks[i : i + n] for i in range(0, len(ranks), n)]
        return ranks

    def groups(self, axes: str | tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ only along `axes` (of one view), in rank order."""
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        view: View = "dense" if set(wanted) <= set(AXES["dense"]) else "expert"
        assert set(wanted) <= set(AXES[view]), f"axes {wanted} are not of one view"
        keep = [i for i, axis in enumerate(AXES[view]) if axis not in wanted]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            coord = self._coord(rank, view)
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
    if spec == "all":
        ranks: Iterable[int] = range(world)
    elif isinstance(spec, int):
        ranks = (spec,)
    elif isinstance(spec, str):
        low, dash, high = spec.partition("-")
        if not (low.strip().isdigit() and (not dash or high.strip().isdigit())):
            raise ValueError(
                f"layout.{module}.ranks is {spec!r}; needed: all, a number, a-b such as 0-3, or a list"
            )
        ranks = range(int(low), int(high or low) + 1)
    else:
        ranks = tuple(int(r) for r in spec)
    out = tuple(ranks)
    if not out:
        raise ValueError(f"layout.{module}.ranks {spec!r} names no rank; the job has ranks 0-{world - 1}")
    if len(set(out)) < len(out):
        raise ValueError(f"layout.{module}.ranks {list(out)} names a rank twice")
    outside = [r for r in out if not 0 <= r < world]
    if outside:
        raise ValueError(
            f"layout.{module}.ranks {spec!r} needs rank {outside[0]}, but the job has {world} ranks "
            f"(0-{world - 1}); start it with at least {max(out) + 1}, or use ranks: all"
        )
    return out


def make_layout(module: str, world: int, spec: Mapping[str, Any]) -> Layout:
    """A checked layout of `module` on a job of `world` ranks, from its mapping of layout keys.

    Raises ValueError saying what was given, what is needed and the nearest layout that works.
    """
    known = ("ranks", *DEGREES, "sequence_parallel")
    for key in spec:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"unknown key layout.{module}.{key}{hint}")
    ranks = parse_ranks(spec.get("ranks", "all"), world, module)
    degrees = {}
    for name in DEGREES:
        value = spec.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"layout.{module}.{name} is {value!r}; needed: a whole number of at least 1")
        degrees[name] = value
    layout = Layout(module, ranks, **degrees, sequence_parallel=bool(spec.get("sequence_parallel", False)))
    for names, product in (
        (("tp", "cp", "pp"), layout.tp * layout.cp * layout.pp),
        (("etp", "ep", "pp"), layout.etp * layout.ep * layout.pp),
    ):
        if layout.size % product:
            given = " x ".join(f"{n}={degrees[n]}" for n in names if degrees[n] > 1)
            raise ValueError(
                f"layout.{module}: {given} needs a multiple of {product} ranks, given {layout.size}; "
                f"{_nearest_degrees(layout, names)}"
            )
    if layout.vpp > 1 and layout.pp == 1:
        raise ValueError(f"layout.{module}: vpp={layout.vpp} needs pp > 1, given pp=1; use vpp=1 or pp=2")
    return layout


def _nearest_degrees(layout: Layout, names: tuple[str, ...]) -> str:
    """Change the first degree above one that can be mended alone to the nearest value that divides."""
    for name in names:
        rest = 1
        for other in names:
            rest *= 1 if other == name else getattr(layout, other)
        given = getattr(layout, name)
        if given > 1 and layout.size % rest == 0:
            return f"nearest: {name}={' or '.join(map(str, nearest(given, layout.size // rest)))}"
    return f"nearest: {' = '.join(names)} = 1"


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


def placement(a: Layout, b: Layout) -> Literal["colocated", "disjoint", "overlapping"]:
    """How two modules' ranks relate."""
    shared = set(a.ranks) & set(b.ranks)
    if not shared:
        return "disjoint"
    return "colocated" if set(a.ranks) == set(b.ranks) else "overlapping"


def check_supported(layouts: Mapping[str, Layout]) -> None:
    """Refuse what is legal to write but not executed yet: cp, pp, vpp, etp, and placements not colocated."""
    for name, layout in layouts.items():
        for degree in ("cp", "pp", "vpp", "etp"):
            value = getattr(layout, degree)
            if value > 1:
                raise ValueError(
                    f"layout.{name}.{degree}={value} is not executed yet; needed: {degree}=1 "
                    f"(tp, dp, ep and sequence_parallel are). Nearest: {degree}=1, which makes "
                    f"dp={layout.size // (layout.tp * (layout.cp if degree != 'cp' else 1))}"
                )
    first = next(iter(layouts.values()))
    for name, layout in layouts.items():
        how = placement(first, layout)
        if how != "colocated":
            raise ValueError(
                f"modules {first.module} on ranks {list(first.ranks)} and {name} on ranks "
                f"{list(layout.ranks)} are {how}, which is not executed yet; needed: the same ranks for all "
                "modules. Nearest: ranks: all for every module"
            )
