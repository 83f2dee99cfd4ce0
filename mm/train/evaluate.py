"""Held-out loss, and how much each modality lowers it."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mm.data.encode import TokenSegment
from mm.data.order import permute_items
from mm.data.reader import BadSample
from mm.data.sample import Sample
from mm.errors import DataError
from mm.plan.step_plan import StepPlan
from mm.plan.subsets import Subset, SubsetLoss
from mm.ranks.batch import RankMicrobatch
from mm.ranks.feed import prepare
from mm.ranks.job import Data, Job
from mm.ranks.skipped import Skip, merged, written
from mm.ranks.stop import Stop, StopRequested
from mm.train.forward import OnTokens
from mm.train.step import StepResult, run_step

T = TypeVar("T")
REPEATS = 5  # mean occurrences of a text from which on the frequencies of texts are meaningful


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats a supervised token.

    loss: over all of them. intact[m]: over those that depend on module m. lift[m]: the same with m's items
    exchanged between samples, minus intact[m].
    """

    loss: float
    lift: Mapping[str, float]
    intact: Mapping[str, float]


class _Unreadable(Exception):
    """Some ranks could not read samples. skips: all of those samples, the same on all ranks."""

    def __init__(self, skips: Sequence[Skip]) -> None:
        super().__init__(f"unreadable samples {[s.sample_id for s in skips]}")
        self.skips = skips


LeaveOut = Callable[[Sequence[Skip]], object]
"""Is given samples that an evaluation leaves out from then on; on every rank, the same on all."""


def evaluate(
    job: Job,
    data: Data,
    samples: Sequence[Sample],
    seed: int,
    stop: Stop | None = None,
    leave_out: LeaveOut | None = None,
) -> Evaluation:
    """Evaluate `samples` intact and with each modality's items permuted; every rank calls this.

    Unreadable samples are left out on all ranks. leave_out: None has rank 0 print them. Raises DataError
    where none is left, and StopRequested on all ranks where one of them was asked to end.
    """
    run = lambda some: _evaluate(job, data, some, seed, stop)  # noqa: E731
    return _readable(samples, run, leave_out or _naming(job))


def _naming(job: Job) -> LeaveOut:
    """Has rank 0 print the samples that are left out."""

    def name(skips: Sequence[Skip]) -> None:
        for one in skips if job.rank.rank == 0 else ():
            print(f"not evaluated: {one}", file=sys.stderr, flush=True)

    return name


def _readable(samples: Sequence[Sample], run: Callable[[Sequence[Sample]], T], leave_out: LeaveOut) -> T:
    """run() of the samples that all ranks can read. Raises DataError where none can be."""
    last = ""
    while samples:
        try:
            return run(samples)
        except _Unreadable as found:
            leave_out(found.skips)
            ids, last = {s.sample_id for s in found.skips}, f" ({found.skips[-1]})"
            samples = [s for s in samples if s.id not in ids]
    raise DataError(f"no evaluation sample can be read{last}")


@dataclass(frozen=True)
class Losses:
    """Sums over all supervised tokens of some samples, by subset: the same in every layout but for rounding.

    nats: of losses. tokens: how many there are.
    """

    nats: Mapping[Subset, float]
    tokens: Mapping[Subset, int]

    @property
    def every(self) -> SubsetLoss:
        """Of all of them."""
        n = sum(self.tokens.values())
        return SubsetLoss(sum(self.nats.values()) / max(n, 1), n)

    def by(self, field: str) -> dict[str, SubsetLoss]:
        """By modality or source, as `field` of Subset says, in alphabetical order."""
        names = sorted({getattr(subset, field) for subset in self.tokens})
        found = {}
        for name in names:
            own = [subset for subset in self.tokens if getattr(subset, field) == name]
            n = sum(self.tokens[subset] for subset in own)
            found[name] = SubsetLoss(sum(self.nats[subset] for subset in own) / max(n, 1), n)
        return found


def losses(job: Job, data: Data, samples: Sequence[Sample]) -> Losses:
    """The losses of samples by modality and by data set; every rank calls this.

    Unreadable samples are left out on all ranks, and rank 0 prints them. Raises DataError where none is left.
    """
    return _readable(samples, lambda some: _losses(job, data, some), _naming(job))


def _losses(job: Job, data: Data, samples: Sequence[Sample]) -> Losses:
    nats: dict[Subset, Tensor] = {}
    tokens: dict[Subset, int] = {}
    for plan, result in _steps(job, data, samples, None, None):
        own = (result.losses * plan.supervised).unbind()
        for subset, count, share in zip(plan.subsets.names, plan.subsets.tokens.tolist(), own, strict=True):
            nats[subset] = nats[subset] + share if subset in nats else share
            tokens[subset] = tokens.get(subset, 0) + count
    sums = job.control.gather(list(nats.values())).sum(axis=0)
    return Losses(dict(zip(nats, map(float, sums), strict=True)), tokens)


def _evaluate(job: Job, data: Data, samples: Sequence[Sample], seed: int, stop: Stop | None) -> Evaluation:
    modules = list(job.blueprint.inputs.encoders)
    loss, intact = _mean_losses(job, data, samples, stop)
    lift = {}
    for module in modules:
        _, mixed = _mean_losses(job, data, permute_items(samples, module, seed), stop)
        lift[module] = mixed[module] - intact[module]
    return Evaluation(loss, lift, intact)


@dataclass
class _LossSum:
    """Sum of the losses of some tokens, in nats, and how many they are; on the device once there are any."""

    nats: Tensor | float = 0.0
    tokens: Tensor | float = 0.0

    def add(self, token_loss: Tensor, chosen: Tensor) -> None:
        """Add the losses [T] of the tokens that are chosen (bool [T])."""
        self.nats = self.nats + torch.where(chosen, token_loss, 0.0).sum(dtype=torch.float64)
        self.tokens = self.tokens + chosen.sum(dtype=torch.float64)


@contextmanager
def _eval_mode(job: Job) -> Iterator[None]:
    """Put all modules into eval mode, then each submodule back into the mode that it had, on errors too.

    A wrapped module may have submodules that are always in eval mode.
    """
    modes = [(sub, sub.training) for part in job.modules() for sub in part.modules()]
    try:
        for sub, _ in modes:
            sub.training = False
        yield
    finally:
        for sub, training in modes:
            sub.training = training


def _mean_losses(
    job: Job, data: Data, samples: Sequence[Sample], stop: Stop | None
) -> tuple[float, dict[str, float]]:
    """Mean loss over all supervised tokens, and by module over those that depend on it."""
    every, by_module = _LossSum(), {m: _LossSum() for m in job.blueprint.inputs.encoders}

    def add(mb: RankMicrobatch, token_loss: Tensor) -> None:
        assert mb.llm is not None
        if not job.counts_loss:
            return
        every.add(token_loss, mb.llm.labels >= 0)
        for module, own in by_module.items():
            own.add(token_loss, mb.depends[module])

    for _ in _steps(job, data, samples, stop, add):
        pass
    mine = [x for own in (every, *by_module.values()) for x in (own.nats, own.tokens)]
    nats, tokens = job.control.gather(mine).sum(axis=0).reshape(-1, 2).T
    means = [float(mean) for mean in nats / tokens.clip(min=1.0)]
    return means[0], dict(zip(by_module, means[1:], strict=True))


def _steps(
    job: Job, data: Data, samples: Sequence[Sample], stop: Stop | None, on_tokens: OnTokens | None
) -> Iterator[tuple[StepPlan, StepResult]]:
    """Run the samples in global batches, in eval mode; raises _Unreadable and StopRequested on all ranks."""
    batch = job.blueprint.cfg.train.global_batch
    with _eval_mode(job):
        for step, at in enumerate(range(0, len(samples), batch)):
            if stop is not None and job.control.any(stop.requested):
                raise StopRequested
            prepared = prepare(step, samples[at : at + batch], data.assembler)
            found = job.control.agree(prepared.plan, [b.sample_id for b in prepared.bad])
            if found:
                raise _Unreadable(merged(job.control.tell(written(prepared.bad))))
            yield prepared.plan, run_step(job, prepared, train=False, on_tokens=on_tokens)


def blind_guess(
    samples: Sequence[Sample], encoded: Callable[[Sample], Sequence[TokenSegment]]
) -> dict[str, float]:
    """By module, the loss in nats a token of a guess from the frequencies of the texts that depend on it.

    That loss is the entropy of those texts. A model that neither sees the module's items nor learns anything
    from the text around cannot do better. Modules whose texts hardly repeat, such as captions, are left out.
    encoded: Assembler.encoded.
    """
    texts: dict[str, Counter[tuple[int, ...]]] = {}
    for sample in (s for s in samples if s.whole):
        try:
            segments = encoded(sample)
        except BadSample:  # it has become unreadable since the evaluation
            continue
        for seg in segments:
            if seg.ids and seg.depends is not None and seg.loss:
                texts.setdefault(seg.depends, Counter())[tuple(seg.ids)] += 1
    out = {}
    for module, found in texts.items():
        total = found.total()
        if total >= REPEATS * len(found):
            nats = -sum(n * math.log(n / total) for n in found.values())
            out[module] = nats / sum(n * len(text) for text, n in found.items())
    return out
