"""The only messages that ranks exchange outside the model: a small one after each step.

It carries what a rank says of the next step too (notice). Where some rank has not prepared that yet, one more
message before the step does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mm.errors import PolyrankError
from mm.plan.step_plan import StepPlan
from parallel.sequence.host import to_device

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in __all__

SLOTS = 14  # ids of bad samples that fit one message; more of them take another round
NOTICE = 4 + SLOTS  # numbers of a notice
GRACE_S = 3.0  # seconds that other ranks have to arrive at a failed message before they are named as missing


def notice(plan: StepPlan | None, bad: Collection[int]) -> list[float]:
    """What a rank tells the others of a step before it runs: NOTICE numbers, for Control.compare().

    plan: the step's, or None where it is not prepared. bad: its samples that are unreadable.
    """
    if plan is None:
        return [0.0] * NOTICE
    ids = sorted(bad)[:SLOTS]
    high, low = divmod(plan.digest, 1 << 32)  # a float64 holds 53 bits
    return [1.0, float(high), float(low), float(len(ids)), *map(float, ids), *[-1.0] * (SLOTS - len(ids))]


def whole_job() -> dist.ProcessGroup:
    """The default process group, which must be initialised."""
    group = dist.group.WORLD
    assert group is not None
    return group


@dataclass(frozen=True)
class Control:
    """Control messages between all ranks of the job."""

    group: dist.ProcessGroup  # of every rank of the job
    device: torch.device
    # Ranks record here which message they have reached, so that an error can name the rank that is missing;
    # without it the error is the backend's.
    store: Store | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False)

    def __post_init__(self) -> None:
        if self.store is not None:  # an earlier job of this process may have left a number
            self.store.set(self._key(dist.get_rank(self.group)), "0")

    def gather(self, values: Sequence[float | Tensor]) -> np.ndarray:
        """Every rank's `values`, float64 [world, n], the same on all ranks; one host wait.

        values: numbers, and scalars on the device, which go into the message without being read.
        """
        tensors = {i: v for i, v in enumerate(values) if isinstance(v, Tensor)}
        numbers = [0.0 if i in tensors else v for i, v in enumerate(values)]
        mine = to_device(np.array(numbers, dtype=np.float64), self.device)
        if tensors:
            at = to_device(np.fromiter(tensors, dtype=np.int64), self.device)
            mine.index_copy_(0, at, torch.stack([v.to(mine) for v in tensors.values()]))
        return self._gather(mine)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank, the same on all of them."""
        return bool(self.gather([float(flag)]).any())

    def overdue(self, error: RuntimeError) -> PolyrankError:
        """What to raise for a time-out in messages of some ranks: it names those that have not come to one.

        Every rank whose wait has timed out calls this.
        """
        number = next(self._numbers)
        if self.store is not None:
            self.store.set(self._key(dist.get_rank(self.group)), str(number))
        return PolyrankError(
            self._missing(number, dist.get_world_size(self.group), str(error).split("\n")[0])
        )

    def agree(self, plan: StepPlan, bad: Collection[int]) -> frozenset[int]:
        """compare() by a message of its own."""
        return self.compare(plan, self.gather(notice(plan, bad)))

    def compare(self, plan: StepPlan, notices: np.ndarray) -> frozenset[int]:
        """Union over ranks of the samples found unreadable; empty means the step may run.

        notices: every rank's [world, NOTICE], all of them ready.

        Raises PolyrankError naming the ranks whose plan differs from rank 0's, and the first sample in which
        it does.
        """
        _, high, low, count, *_ = notices.T
        odd = np.flatnonzero((high != high[0]) | (low != low[0])).tolist()
        if odd:
            raise PolyrankError(
                f"step {plan.step + 1}: ranks {odd} planned another step than rank 0, "
                f"{self._first_other(plan, odd)}; the data, its index or the config differ between machines: "
                "compare them and start again"
            )
        return frozenset(int(i) for row, n in zip(notices, count, strict=True) for i in row[4 : 4 + int(n)])

    def tell(self, mine: str) -> list[str]:
        """What every rank says in words, by rank. Every rank calls this; two messages."""
        raw = np.frombuffer(mine.encode(), dtype=np.uint8)
        lengths = self._gather(to_device(np.array([len(raw)]), self.device))[:, 0].tolist()
        padded = np.zeros(max(1, *lengths), dtype=np.uint8)
        padded[: len(raw)] = raw
        rows = self._gather(to_device(padded, self.device))
        return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]

    def _first_other(self, plan: StepPlan, odd: Sequence[int]) -> str:
        """The first sample whose plan on a rank in `odd` differs from rank 0's. Every rank calls this."""
        n = len(plan.sample_ids)
        counts = self._gather(to_device(np.array([n]), self.device))[:, 0]
        mine = np.full((2, int(counts.max())), -1, dtype=np.int64)
        mine[0, :n], mine[1, :n] = plan.sample_ids, plan.digests
        table = self._gather(to_device(mine.reshape(-1), self.device)).reshape(len(counts), 2, -1)
        for j, r in itertools.product(range(table.shape[2]), odd):
            if (table[r, :, j] != table[0, :, j]).any():
                ours, theirs = table[0, 0, j], table[r, 0, j]
                return f"first in sample {j} of the batch (id {ours} on rank 0, {theirs} on rank {r})"
        return "though every sample is planned alike"

    def _gather(self, mine: Tensor) -> np.ndarray:
        world, number = dist.get_world_size(self.group), next(self._numbers)
        out = mine.new_empty(world * len(mine))
        if self.store is not None:
            self.store.set(self._key(dist.get_rank(self.group)), str(number))
        try:
            dist.all_gather_into_tensor(out, mine, group=self.group)
        except RuntimeError as error:
            raise PolyrankError(self._missing(number, world, str(error).splitlines()[0])) from error
        return out.view(world, len(mine)).cpu().numpy()

    def _missing(self, number: int, world: int, why: str) -> str:
        """The text of an error that names the ranks that have not reached message `number`."""
        absent = list(range(world)) if self.store is not None else []
        deadline = time.monotonic() + GRACE_S
        while absent and time.monotonic() < deadline:
            absent = [r for r in absent if self._last(r) < number]
            time.sleep(0.1)
        if not absent:
            return f"a message between all ranks failed ({why})"
        who = ", ".join(f"rank {r}" for r in absent)
        return f"no word from {who}, which has ended or hangs; all others wait for it ({why})"

    def _last(self, rank: int) -> int:
        """The number of the last message that a rank has reached, 0 for none."""
        assert self.store is not None
        key = self._key(rank)
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def _key(self, rank: int) -> str:
        return f"message/{rank}"
