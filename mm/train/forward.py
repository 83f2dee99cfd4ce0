"""Forward computations of one step: a stage of an encoder, or a stage of the language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from encoders.contract import join_batches
from encoders.module import RowsMismatch
from mm.config.outline import SINK
from mm.errors import DataError
from mm.ranks.batch import RankMicrobatch
from mm.train.flight import Flight, Key, key_of
from mm.train.statistics import Watch
from mm.train.trail import Trail
from mm.train.transfer import Transfers
from parallel.schedule import Action

OnTokens = Callable[[RankMicrobatch, Tensor], None]


class Forward:
    """Handler of FORWARD. losses: by subset of the step's samples, this rank's part of its loss so far.
    trail: None where nothing is learnt."""

    def __init__(
        self,
        flight: Flight,
        transfers: Transfers,
        on_tokens: OnTokens | None,
        watch: Watch | None,
        trail: Trail | None,
    ) -> None:
        self.flight, self.transfers, self.on_tokens, self.watch = flight, transfers, on_tokens, watch
        self.trail = trail
        self.micro, self.supervised = flight.prepared.micro, flight.prepared.plan.supervised
        n, device = len(flight.prepared.plan.subsets.names), flight.job.rank.device
        self.losses = torch.zeros(n, dtype=torch.float64, device=device)

    def forward(self, action: Action) -> float:
        """Run a stage; returns when its inputs had come."""
        key = key_of(action)
        self.transfers.release(action)
        hidden = self.transfers.hidden(action)
        if action.module == SINK:
            return self._sink(key, hidden)
        ready = time.perf_counter()
        self._source(action, hidden)
        return ready

    def _source(self, action: Action, hidden: Tensor | None) -> None:
        keys = self.flight.covered(action)
        values = self._encode(keys, hidden)
        if self.trail is not None:
            self.trail.forward(keys, [hidden], [values])
        if self.flight.joins(action):
            self.flight[key_of(action)].output.fill(values)
            return
        if len(keys) == 1:
            self.flight[keys[0]].output.fill(values)
            return
        if self.flight.learns(keys[0]):
            self.flight[keys[0]].joint_output.fill(values)
        edge = next(e for e in self.flight.job.blueprint.edges if e.source == action.module)
        rows = [self.micro[key.microbatch].edges[edge].forward.rows_in for key in keys]
        for key, own in zip(keys, torch.split(values.detach(), rows), strict=True):
            self.flight[key].output.fill(own)

    def _encode(self, keys: list[Key], hidden: Tensor | None) -> Tensor:
        """The output of an encoder's stage. Raises DataError naming the sample that it cannot take."""
        module, part = keys[0].module, self.flight.part(keys[0])
        mine = [self.micro[key.microbatch] for key in keys]
        try:
            batch = join_batches([mb.items[module] for mb in mine])
            # An encoder may run on something else where there are no items.
            with self._watched(bool(batch.metas)):
                out = part(batch) if hidden is None else part(batch, hidden)
        except RowsMismatch as error:
            names = [name for mb in mine for name in mb.names[module]]
            raise DataError(f"module {module}, sample {names[error.item]}: {error.why}") from error
        except Exception as error:
            note_samples(error, [name for mb in mine for name in mb.names[module]])
            raise
        values: Tensor = out if isinstance(out, Tensor) else out.values
        return values

    def _sink(self, key: Key, hidden: Tensor | None) -> float:
        mb, part = self.micro[key.microbatch], self.flight.part(key)
        assert mb.llm is not None
        rows = self.transfers.rows(key)
        ready = time.perf_counter()
        with self._watched():
            out = part(mb.llm, rows) if hidden is None else part(mb.llm, rows, hidden)
        if self.trail is not None:
            self.trail.forward([key], [hidden, *rows.values()], [out])
        if not self.flight.is_loss(key):
            self.flight[key].output.fill(out)
            return ready
        if self.on_tokens is not None:
            self.on_tokens(mb, out)
        loss = out.sum() / self.supervised
        if self.flight.learns(key):
            self.flight[key].output.fill(loss)
        if self.flight.job.counts_loss:
            self._add(mb, out.detach())
        return ready

    def _watched(self, counts: bool = True) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.watch.forward(counts)

    def _add(self, mb: RankMicrobatch, token_loss: Tensor) -> None:
        """Add the losses [T] of a micro-batch's tokens to those of their subsets."""
        assert mb.llm is not None and mb.llm.loss_rows is not None and mb.subsets is not None
        found = token_loss.index_select(0, mb.llm.loss_rows[0]).to(torch.float64)
        self.losses.index_add_(0, mb.subsets, found, alpha=1 / self.supervised)


def note_samples(error: Exception, names: Sequence[str]) -> None:
    """Have an error tell the samples that it came with: the first few, and none where there are none."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    if names:
        error.add_note(f"its samples: {', '.join(names[:4])}{more}")
