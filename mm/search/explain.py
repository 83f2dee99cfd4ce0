"""What each second of a candidate goes to, and which change would help most: its neighbours, predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from mm.config.schema import Config
from mm.predict.hardware import Hardware
from mm.predict.step import Prediction
from mm.report.units import seconds_text
from mm.search.candidate import Candidate
from mm.search.neighbours import around
from mm.search.predictor import Judged, Predictor
from mm.search.space import Space

AS_FAST = 0.002  # share below which two steps are said to be equal
FASTER = 2.0  # factor by which a link or a memory is made faster, to see what that would give


@dataclass(frozen=True)
class Neighbour:
    """A candidate that differs in one thing, or the same on other hardware. change: what differs."""

    change: str
    judged: Judged


def seconds_lines(found: Prediction) -> list[str]:
    """What the seconds of the mean rank go to, in plain sentences, the largest first."""
    out = []
    for (module, what), seconds in sorted(found.breakdown.items(), key=lambda item: -item[1]):
        share = seconds / found.step_s
        if share >= 0.005:
            who = module or "all modules"
            out.append(f"{seconds_text(seconds)} ({share:.0%}) {WORDS.get(what, what)} of {who}.")
    return out


WORDS = {
    "compute": "are computation",
    "launch": "are launches of kernels",
    "tp": "are messages between tensor parallel ranks",
    "cp": "are messages between context parallel ranks",
    "ep": "are exchanges of rows between experts' ranks",
    "data ranks": "are waiting for weights and gradients of data ranks",
    "boundary": "are waiting for rows between encoder and language model",
    "pipeline": "are waiting for hidden states between stages",
    "bubble": "are idle while other stages compute, for lack of work",
    "waiting": "are waiting for other ranks of the same group",
    "optimizer": "are the update",
    "update message": "are the message of the update",
    "other": "are other messages",
}


def neighbours(
    cfg: Config,
    on: tuple[int, Hardware],
    space: Space,
    found: Judged,
    known: Mapping[Candidate, Judged] = MappingProxyType({}),
) -> list[Neighbour]:
    """All candidates that differ in one thing from a found one, and it on faster links; fastest first.

    on: ranks and their hardware. known: what was predicted before.
    """
    world, hardware = on
    predictor = Predictor(cfg, world, hardware)
    out = [Neighbour(what, known.get(c) or predictor.judge(c)) for what, c in around(space, found.candidate)]
    for what, other in faster(hardware, crosses=_crosses(cfg, world)):
        out.append(Neighbour(what, Predictor(cfg, world, other).judge(found.candidate)))
    fits = [n for n in out if n.judged.why is None]
    rest = [n for n in out if n.judged.why is not None]
    return sorted(fits, key=lambda n: n.judged.step_s) + rest


def _crosses(cfg: Config, world: int) -> bool:
    return cfg.run.node_size is not None and cfg.run.node_size < world


def faster(hardware: Hardware, *, crosses: bool) -> Iterator[tuple[str, Hardware]]:
    """The hardware with one thing made faster. crosses: whether the job is on several nodes."""
    links, by = hardware.links, FASTER
    inside = replace(links.inside, bandwidth=by * links.inside.bandwidth)
    yield f"links inside a node {by:g} times as fast", replace(hardware, links=replace(links, inside=inside))
    if links.across is not None and crosses:
        across = replace(links.across, bandwidth=by * links.across.bandwidth)
        what = f"links across nodes {by:g} times as fast"
        yield what, replace(hardware, links=replace(links, across=across))
    memory = replace(hardware.memory, bandwidth=by * hardware.memory.bandwidth)
    yield f"memory {by:g} times as fast", replace(hardware, memory=memory)


def faster_lines(cfg: Config, world: int, hardware: Hardware, found: Prediction) -> list[str]:
    """What other hardware would give to a config as it stands, in plain sentences."""
    out = []
    for what, other in faster(hardware, crosses=_crosses(cfg, world)):
        seconds = Predictor(cfg, world, other).of_config(cfg).step_s
        out.append(f"{what}: {_times(found.step_s / seconds)}, {seconds_text(seconds)}.")
    return out


def _times(ratio: float) -> str:
    if abs(ratio - 1) < AS_FAST:
        return "as fast"
    return f"{ratio:.3f} times faster" if ratio > 1 else f"{1 / ratio:.3f} times slower"


def change_lines(found: Judged, around: list[Neighbour]) -> list[str]:
    """What changes would give, in plain sentences."""
    out = []
    for n in around:
        if n.judged.why is not None:
            out.append(f"{n.change}: not possible: {n.judged.why}")
            continue
        if n.judged.bytes == found.bytes:
            memory = "as much memory"
        else:
            memory = f"{n.judged.bytes / 1e9:.3g} GB instead of {found.bytes / 1e9:.3g}"
        times = _times(found.step_s / n.judged.step_s)
        out.append(f"{n.change}: {times}, {seconds_text(n.judged.step_s)}, {memory}.")
    return out
