"""Layouts: how one module is parallelised over its ranks. Pure; no process group, no torch.

Axis order, fastest first: tp, cp, dp, pp in the dense view; etp, ep, edp, pp in the expert view of the same
ranks (parallel folding, arXiv 2504.14960). Only pp must agree between the two views.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

View = Literal["dense", "expert"]
DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp")
AXES: dict[str, tuple[str, ...]] = {"dense": ("tp", "cp", "dp", "pp"), "expert": ("etp", "ep", "edp", "pp")}


Changes = Mapping[str, Any]  # a key and its new value


class Unfit(ValueError):
    """A layout or a schedule that is not possible.

    why: what was given, and what is needed.
    works: alternatives, each a set of changes that suffices as far as the raising code knows; a caller that
        knows more may propose others. Keys are those of a layout or of a model (tp), or dotted as in a config
        (schedule.kind).
    module: the module that keys without a dot belong to.
    """

    def __init__(self, why: str, works: Sequence[Changes] = (), module: str | None = None) -> None:
        self.why, self.works, self.module = why, tuple(works), module
        super().__init__(with_advice(why, works))


def with_advice(why: str, works: Sequence[Changes]) -> str:
    """A refusal with its alternatives, each as it is typed: "tp=2 pp=1 or tp=4"."""
    return f"{why}; nearest: {' or '.join(map(typed, works))}" if works else why


def typed(changes: Changes) -> str:
    """Changes as a user types them, without spaces inside a value."""
    shown = {k: "null" if v is None else str(v).replace(" ", "") for k, v in changes.items()}
    return " ".join(f"{k}={v}" for k, v in shown.items())


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

    Degrees count ranks, but for vpp; 1 is off. They come from the config's layout.MODULE mapping, key by key.

    module: name of the module; the key under `layout`.
    ranks: global ranks that the module lives on, in mesh order.
    tp: tensor parallel; ranks that shard one layer's heads, hidden widths and vocabulary (Megatron-LM, arXiv
        1909.08053).
    cp: context parallel; ranks that split the tokens of a packed stream, or the rows of an encoder's items.
    pp: pipeline parallel; ranks that partition the layers into stages.
    vpp: virtual stages a pipeline rank holds (interleaved schedule, arXiv 2104.04473, section 2.2).
    ep: expert parallel, in the expert view; ranks that split a layer's experts.
    etp: expert tensor parallel, in the expert view; ranks that shard one expert.
    sequence_parallel: whether each tp rank keeps only its share of the tokens between blocks (arXiv
        2205.05198, section 4.2). Does nothing at tp 1.
    data_parallel: the policy of its data ranks (parallel/topology/data_parallel.py), or auto.

    Two degrees follow: dp = ranks / (tp cp pp), edp = ranks / (etp ep pp).
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
    data_parallel: str = "auto"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def dp(self) -> int:
        """Data parallel: ranks with the same weights and other samples."""
        return self.size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Expert data parallel: ranks with the same part of the same experts."""
        return self.size // (self.etp * self.ep * self.pp)

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees that a config sets, by key."""
        return {name: getattr(self, name) for name in DEGREES}

    @property
    def token_shards(self) -> int:
        """Into how many shares the tokens of one cp rank are split over tp between blocks."""
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
        return _groups(self.ranks, self.shape(view), tuple(axis in wanted for axis in AXES[view]))

    def peers(self, rank: int, axes: str | tuple[str, ...]) -> tuple[int, ...]:
        """The group of `rank` along `axes`."""
        return next(g for g in self.groups(axes) if rank in g)

    def describe(self) -> str:
        """Degrees above one, for tables: "dp4", "tp2 dp2 ep4"."""
        names = [a for a in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp") if getattr(self, a) > 1]
        parts = [f"{a}{getattr(self, a)}" for a in names] + (["sp"] if self.sequence_parallel else [])
        return " ".join(parts) or "one rank"


@lru_cache(maxsize=512)
def _groups(
    ranks: tuple[int, ...], shape: tuple[int, ...], wanted: tuple[bool, ...]
) -> tuple[tuple[int, ...], ...]:
    """Layout.groups(). shape: of a view. wanted: by axis of it, whether ranks of a group differ along it."""
    inside, between = [0], [0]  # indices of a group's ranks from its first; indices of first ranks
    stride = 1
    for n, along in zip(shape, wanted, strict=True):
        steps = range(0, n * stride, stride)
        if along:
            inside = [a + b for a in steps for b in inside]
        else:
            between = [a + b for a in steps for b in between]
        stride *= n
    return tuple(tuple([ranks[first + i] for i in inside]) for first in between)


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
    if not isinstance(out, range) and len(set(out)) < len(out):
        once: list[Changes] = [{"ranks": list(dict.fromkeys(out))}, {"ranks": "all"}]
        raise Unfit(f"layout.{module}.ranks {list(out)} names a rank twice", once, module)
    outside = next((r for r in out if r >= world), None)
    if outside is not None:
        most = out[-1] if isinstance(out, range) else max(out)
        raise Unfit(
            f"layout.{module}.ranks {spec!r} goes up to rank {most}, but the job has {world} ranks "
            f"(0-{world - 1}); needed: ranks below {world}, or a job of at least {most + 1} ranks",
            [{"ranks": "all"}],
            module,
        )
    return tuple(out)


def _named_ranks(spec: Any, world: int) -> Sequence[int] | None:
    """The ranks that `spec` names, in or out of the job; None where `spec` does not name ranks.

    A range stays one: a mistyped end may be more numbers than memory holds.
    """
    if spec == "all":
        return tuple(range(world))
    if isinstance(spec, str):
        low, dash, high = (part.strip() for part in spec.partition("-"))
        if not (low.isdecimal() and (high.isdecimal() or not dash)):
            return None
        return range(int(low), int(high or low) + 1)
    ranks = list(spec) if isinstance(spec, Sequence) else [spec]
    return tuple(ranks) if all(_whole(r) and r >= 0 for r in ranks) else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # YAML's true is no number


def make_layout(module: str, world: int, spec: Mapping[str, Any]) -> Layout:
    """A checked layout of `module` on a job of `world` ranks, from its mapping of layout keys.

    Raises ValueError saying what was given, what is needed and the nearest layout that works.
    """
    known = ("ranks", *DEGREES, "sequence_parallel", "data_parallel")
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
    policy = str(spec.get("data_parallel", "auto"))
    layout = Layout(module, ranks, **degrees, sequence_parallel=sp, data_parallel=policy)
    for names in (("tp", "cp", "pp"), ("etp", "ep", "pp")):
        product = math.prod(degrees[n] for n in names)
        if layout.size % product:
            given = " x ".join(f"{n}={degrees[n]}" for n in names if degrees[n] > 1)
            why = f"layout.{module}: {given} needs a multiple of {product} ranks, given {layout.size}"
            raise Unfit(why, nearest_degrees(layout.size, degrees), module)
    if layout.vpp > 1 and layout.pp == 1:
        why = f"layout.{module}: vpp={layout.vpp} needs pp > 1, given pp=1"
        raise Unfit(why, nearest_degrees(layout.size, degrees), module)
    return layout


PAIRS = 12  # nearest pairs of degrees of a view that are tried for each pp
TRIES = 300  # sets of changes that are tried


def nearest_degrees(
    size: int,
    given: Mapping[str, int],
    fits: Callable[[Mapping[str, int]], bool] = lambda degrees: True,
) -> list[dict[str, int]]:
    """One or two sets of changes that make `given` degrees fit `size` ranks and `fits`: [{"tp": 4}].

    The nearest ones: those that change the fewest degrees, then by the smallest factors. Empty where none of
    the nearest fits. fits: takes all degrees, changed or not.
    """
    found: list[dict[str, int]] = []
    for works in itertools.islice(_by_distance(size, given), TRIES):
        changed = {n: d for n, d in works.items() if d != given[n]}
        if found and len(changed) > len(found[0]):
            break
        if changed and fits(works):
            found.append(changed)
        if len(found) == 2:
            break
    return found


def _by_distance(size: int, given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Degrees that fit `size` ranks, nearest first, at most TRIES; the last has every degree 1."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    found = []
    for pp in divisors:
        # Given pp, the two views do not constrain each other.
        dense = _fitting(divisors, size // pp, given["tp"], given["cp"])
        expert = _fitting(divisors, size // pp, given["etp"], given["ep"])
        for vpp in range(1, given["vpp"] + 1) if pp > 1 else (1,):
            for (tp, cp), (etp, ep) in itertools.product(dense, expert):
                works = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}
                found.append((_distance([(d, given[n]) for n, d in works.items()]), tuple(works.values())))
    found.sort()
    names = ("tp", "cp", "pp", "vpp", "ep", "etp")
    yield from (dict(zip(names, degrees, strict=True)) for _, degrees in found[: TRIES - 1])
    yield dict.fromkeys(names, 1)


def _fitting(divisors: Sequence[int], n: int, a: int, b: int) -> list[tuple[int, int]]:
    """The pairs nearest to (a, b) whose product divides n."""
    pairs = [(x, y) for x in divisors for y in divisors if n % (x * y) == 0]
    return sorted(pairs, key=lambda p: _distance([(p[0], a), (p[1], b)]))[:PAIRS]


def _distance(moves: Sequence[tuple[int, int]]) -> tuple[int, float]:
    """(how many of the (new, old) degrees differ, logarithm of the product of their ratios)."""
    return sum(new != old for new, old in moves), sum(abs(math.log(new / old)) for new, old in moves)


def nearest(given: int, n: int) -> list[int]:
    """The next divisor of n below `given` and the next above it, as far as they exist."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    below = [d for d in divisors if d < given][-1:]
    above = [d for d in divisors if d > given][:1]
    return below + above


def check_divides(what: str, n: int, degree: str, d: int, module: str | None = None) -> None:
    """Refuse a degree that does not divide a count, naming the nearest degrees that do."""
    if n % d:
        works = [{degree: k} for k in nearest(d, n)]
        raise Unfit(f"{what} is {n}, which does not divide by {degree}={d}", works, module)
