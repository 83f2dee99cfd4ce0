"""What each second of a candidate goes to, and which change would help most: its neighbours, predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mm.config.outline import SINK
from mm.config.schema import Config
from mm.predict.hardware import Hardware
from mm.predict.step import Prediction
from mm.search.candidate import Candidate
from mm.search.predictor import Judged, Predictor
from mm.search.space import Limits, Space

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
            out.append(f"{seconds:.4g} s ({share:.0%}) {WORDS.get(what, what)} of {who}.")
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


def neighbours(cfg: Config, world: int, hardware: Hardware, space: Space, found: Judged) -> list[Neighbour]:
    """All candidates that differ in one thing from a found one, and it on faster links; fastest first."""
    predictor = Predictor(cfg, world, hardware)
    out = [Neighbour(what, predictor.judge(c)) for what, c in changes(space, found.candidate)]
    for what, other in faster(hardware):
        out.append(Neighbour(what, Predictor(cfg, world, other).judge(found.candidate)))
    fits = [n for n in out if n.judged.why is None]
    rest = [n for n in out if n.judged.why is not None]
    return sorted(fits, key=lambda n: n.judged.step_s) + rest


def changes(space: Space, of: Candidate) -> Iterator[tuple[str, Candidate]]:
    """The neighbours of a candidate in its space, each with what differs."""
    for i, (module, choice) in enumerate(of.choices):
        limits = space.sink if module == SINK else space.encoders[module]
        for what, degrees in _degrees(limits, choice.block.size, choice.degrees._asdict()):
            changed = choice._replace(degrees=choice.degrees._replace(**degrees))
            yield f"{module} {what}", _with(of, i, module, changed)
        for policy in space.policies(choice.block, choice.degrees):
            if policy != choice.data_parallel:
                changed = choice._replace(data_parallel=policy)
                yield f"{module} data_parallel={policy}", _with(of, i, module, changed)
    most = max(space.microbatches(of.sink.dp, of.sink.degrees.pp))
    for n in (of.microbatches // 2, of.microbatches * 2):
        if 1 <= n <= most:
            yield f"schedule.microbatches={n}", replace(of, microbatches=n)
    for again in space.recompute:
        if again != of.recompute:
            what = "+".join(again) or "nothing"
            yield f"recompute {what}", replace(of, recompute=again)
    kinds = ("1f1b", "zero_bubble") if of.sink.degrees.vpp == 1 else ("interleaved", "zero_bubble")
    for kind in kinds:
        if kind != of.kind and of.sink.degrees.pp > 1:
            yield f"schedule.kind={kind}", replace(of, kind=kind)


def _degrees(limits: Limits, size: int, given: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The next value below and above of each degree, where it divides the ranks."""
    for name in ("tp", "cp", "pp", "ep"):
        values = sorted({*getattr(limits, name), given[name]})
        at = values.index(given[name])
        for value in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2]):
            now = {**given, name: value}
            dense, expert = now["tp"] * now["cp"] * now["pp"], now["etp"] * now["ep"] * now["pp"]
            if size % dense or size % expert or now["pp"] * now["vpp"] > limits.layers:
                continue
            if now["pp"] == 1 < now["vpp"]:
                continue
            more = {"sequence_parallel": value > 1} if name == "tp" else {}
            yield f"{name}={value}", {name: value, **more}


def _with(of: Candidate, i: int, module: str, choice: object) -> Candidate:
    choices = [*of.choices]
    choices[i] = (module, choice)  # type: ignore[assignment]
    return replace(of, choices=tuple(choices))


def faster(hardware: Hardware) -> Iterator[tuple[str, Hardware]]:
    """The hardware with one thing made faster."""
    links, by = hardware.links, FASTER
    inside = replace(links.inside, bandwidth=by * links.inside.bandwidth)
    yield f"links inside a node {by:g} times as fast", replace(hardware, links=replace(links, inside=inside))
    if links.across is not None:
        across = replace(links.across, bandwidth=by * links.across.bandwidth)
        what = f"links across nodes {by:g} times as fast"
        yield what, replace(hardware, links=replace(links, across=across))
    memory = replace(hardware.memory, bandwidth=by * hardware.memory.bandwidth)
    yield f"memory {by:g} times as fast", replace(hardware, memory=memory)


def change_lines(found: Judged, around: list[Neighbour]) -> list[str]:
    """What changes would give, in plain sentences."""
    out = []
    for n in around:
        if n.judged.why is not None:
            out.append(f"{n.change}: not possible: {n.judged.why}")
            continue
        ratio = found.step_s / n.judged.step_s
        memory = f"{n.judged.bytes / 1e9:.3g} GB instead of {found.bytes / 1e9:.3g}"
        if abs(ratio - 1) < 0.002:
            out.append(f"{n.change}: as fast, {memory}.")
        elif ratio > 1:
            out.append(f"{n.change}: {ratio:.3f} times faster, {n.judged.step_s:.4g} s, {memory}.")
        else:
            out.append(f"{n.change}: {1 / ratio:.3f} times slower, {n.judged.step_s:.4g} s, {memory}.")
    return out
