"""Which rank and module first gave a number that is not finite, from what all ranks found. Pure.

What is not finite spreads: with rows to the language model, with the loss to all gradients. Its origin is the
computation that took only finite numbers and gave others. Weights and inputs come before all computations.
Ranks that share a computation, such as those of a tp group, exchange parts of it: all of them are named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from mm.config.outline import SINK

GAVE, CAME, GAVE_BACK, CAME_BACK = "gave", "came", "gave back", "came back"
SPOTS = {
    GAVE: "{what} of module {module} {are} not finite on {ranks}",
    CAME: "what came to module {module} is not finite on {ranks}, and was finite where it was sent",
    GAVE_BACK: "a gradient that module {module} gave is not finite on {ranks}",
    CAME_BACK: "a gradient that came to module {module} is not finite on {ranks}, but was where it was sent",
}
"""What can be wrong at a computation, in the order of a step: what it gave of finite numbers, or what came to
it; then the same of gradients."""
SHOWN = 3  # samples and parameters that are named


class Place(NamedTuple):
    """A computation of a rank, or an input of one. what: it gives. samples: names of those that it was of."""

    what: str
    module: str
    stage: int
    microbatch: int
    samples: list[str]


class Part(NamedTuple):
    """A rank's part of the gradient of a parameter, from one backward. name: in its module. samples: names of
    those that the backward was of."""

    name: str
    module: str
    rank: int
    data_rank: int
    microbatch: int
    samples: list[str]


@dataclass(frozen=True)
class Findings:
    """What of a rank is not finite, in the order of its step; the first few of each kind.

    weights: of weights, buffers and optimizer state, full names. inputs: of encoders. spots: by SPOTS.
    gradients: parameters by full name; overflows: those whose gradients are finite, and their squares not.
    """

    weights: list[str] = field(default_factory=list)
    inputs: list[Place] = field(default_factory=list)
    spots: dict[str, list[Place]] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)
    overflows: list[str] = field(default_factory=list)

    def written(self) -> str:
        """As text, for the other ranks."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Findings:
        """What written() gave."""
        raw: dict[str, Any] = json.loads(text)
        raw["inputs"] = [Place(*p) for p in raw["inputs"]]
        raw["spots"] = {spot: [Place(*p) for p in places] for spot, places in raw["spots"].items()}
        return Findings(**raw)


def origin(ranks: Sequence[Findings]) -> str:
    """In words, what was not finite first, and where. ranks: what each rank found."""
    if named := [(r, name) for r, one in enumerate(ranks) for name in one.weights]:
        return f"{_parameters(named)} is not finite on {_who(named)}: it was so before the step"
    if found := [(r, place) for r, one in enumerate(ranks) for place in one.inputs]:
        return _worded("an input of module {module} is not finite on {ranks}", found)
    for spot, text in SPOTS.items():
        if found := [(r, place) for r, one in enumerate(ranks) for place in one.spots.get(spot, ())]:
            return _worded(text, found)
    if named := [(r, name) for r, one in enumerate(ranks) for name in one.gradients]:
        return f"the gradient of {_parameters(named)} is not finite on {_who(named)}, summed over ranks"
    if named := [(r, name) for r, one in enumerate(ranks) for name in one.overflows]:
        return f"the squared norm of the gradient of {_parameters(named)} is not finite on {_who(named)}"
    return "the loss or the gradient norm is not finite on rank 0, which adds up finite parts of it"


def _worded(text: str, found: Sequence[tuple[int, Place]]) -> str:
    """The first place of a step: encoders compute before the language model, stages in their order."""
    _, first = min(found, key=lambda f: (f[1].microbatch, f[1].module == SINK, f[1].stage))
    same = [(r, p) for r, p in found if p[:4] == first[:4]]
    of = _sampled([name for _, p in same for name in p.samples])
    stage = f"stage {first.stage}, " if first.stage else ""
    who = _numbered(sorted({r for r, _ in same}))
    said = text.format(what=first.what, module=first.module, are=_are(first.what), ranks=who)
    return f"{said} ({stage}micro-batch {first.microbatch}{of})"


def _sampled(names: Sequence[str]) -> str:
    """The first of these samples, behind a comma."""
    samples = list(dict.fromkeys(names))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f", sample{'s' * (len(samples) > 1)} {', '.join(samples[:SHOWN])}{more}" if samples else ""


def _are(what: str) -> str:
    return "are" if what.endswith("s") and not what.endswith("ss") else "is"


def _parameters(named: Sequence[tuple[int, str]]) -> str:
    """The first parameter, and how many more there are."""
    names = list(dict.fromkeys(name for _, name in named))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    module, _, name = names[0].partition(".")
    return f"{name} of module {module}{more}"


def of_sums(ranks: Sequence[Findings]) -> bool:
    """Whether a gradient is the first that is not finite, which is a sum: of whose part, nobody knows."""
    first = any(one.weights or one.inputs or one.spots for one in ranks)
    return not first and any(one.gradients for one in ranks)


def brought(parts: Sequence[Part], *, again: bool) -> str:
    """In words, who brought a gradient that is not finite. parts: those of a second run that are not; again:
    whether the sums of that were not either."""
    if parts:
        first = min(parts, key=lambda part: part.microbatch)
        own = [(0, f"{p.module}.{p.name}") for p in parts if p[1:5] == first[1:5]]
        batch = f"micro-batch {first.microbatch}{_sampled(first.samples)}"
        where = f"rank {first.rank} (data rank {first.data_rank} of module {first.module}, {batch})"
        return f"; run again, {where} gives that of {_parameters(own)}"
    if again:
        return "; run again, each rank's part of it is finite, and their sum is not"
    return "; run again, it is finite: a fault of memory or of a kernel, which does not come twice"


def _who(named: Sequence[tuple[int, str]]) -> str:
    """The ranks that have found the first name."""
    return _numbered(sorted({r for r, name in named if name == named[0][1]}))


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
