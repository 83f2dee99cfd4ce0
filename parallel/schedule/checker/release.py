"""Where a rank releases the memory of transfers that none of its computations waits for. Pure.

A sender's memory is free once its rows have left. Host backends do not report that: the sender has to wait
for the transfer, and may block until the other end takes part. So it waits where the transfer will end soon:

- A message from another rank proves which actions that rank has done. Transfers that it has started by then
  are acknowledged, and waiting for them does not block.
- Sums of gradients that a rank waits for after its last action prove the same: what they acknowledge is
  waited for there.
- Where no message comes back (evaluation, frozen sources, the last gradients of a pipeline), a rank keeps a
  few transfers of a flow under way and then waits for the oldest, which may block.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.schedule.action import OVER_DATA, Kind
from parallel.schedule.checker.reader import Reading, TransferKey

# How many transfers of a flow a rank keeps under way without an acknowledgement. The first that works counts.
WINDOWS = (2, 4, 8)


@dataclass(frozen=True)
class Releases:
    """By computation, the transfers whose memory its rank releases before it computes.

    acknowledged: the other end has started them, so waiting for them does not block.
    blocking: not known to be started, so waiting for them may block.
    """

    acknowledged: dict[int, list[TransferKey]]
    blocking: dict[int, list[TransferKey]]


def place_releases(reading: Reading, window: int) -> Releases:
    """Where all programs release the transfers that no computation waits for. Linear in the actions.

    The last few transfers of a flow are in neither table: they are under way when the list ends.

    window: how many transfers of a flow may be under way without an acknowledgement.
    """
    found = Releases({}, {})
    for p in range(len(reading.computations)):
        for queue in _acknowledged(reading, p, found.acknowledged):
            _blocking(reading, p, queue, window, found.blocking)
    return found


def _acknowledged(reading: Reading, p: int, out: dict[int, list[TransferKey]]) -> list[list[TransferKey]]:
    """Put into `out` what is acknowledged to program p; returns what is left, by flow."""
    starts, started_by, together, waits = reading.starts, reading.started_by, reading.together, reading.waits
    computations = set(reading.computations[p])
    awaited = {key for n in computations for key in waits.get(n, ())}
    progress: dict[int, int] = {}  # by other program, the last of its actions that it is known to have begun
    pending: dict[int, deque[TransferKey]] = defaultdict(deque)  # by flow
    sums: list[TransferKey] = []
    for n in range(reading.first[p], reading.first[p + 1]):
        for key in starts.get(n, ()):
            kind = reading.flows[key[0]].kind
            if kind is Kind.GRAD_SYNC:
                sums.append(key)
            elif key not in awaited and kind not in OVER_DATA:
                pending[key[0]].append(key)
        if n not in computations:
            continue
        for there in (*(started_by[key] for key in waits.get(n, ())), together.get(n, {})):
            _reach(progress, there)
        for queue in pending.values():
            while queue and _is_started(started_by[queue[0]], p, progress):
                out.setdefault(n, []).append(queue.popleft())
    for key in sums:
        _reach(progress, started_by[key])
    return [[k for k in queue if not _is_started(started_by[k], p, progress)] for queue in pending.values()]


def _reach(progress: dict[int, int], there: Mapping[int, int]) -> None:
    """Other programs are known to have come as far as `there` says."""
    for q, at in there.items():
        progress[q] = max(progress.get(q, -1), at)


def _is_started(ends: Mapping[int, int], p: int, progress: Mapping[int, int]) -> bool:
    """Whether all ends of a transfer but that of program p are known to be started."""
    return all(q == p or progress.get(q, -1) >= at for q, at in ends.items())


def _blocking(
    reading: Reading, p: int, queue: Sequence[TransferKey], window: int, out: dict[int, list[TransferKey]]
) -> None:
    """Release each transfer of `queue` before the computation that makes the one `window` places later."""
    makes = [reading.begins(reading.before[reading.started_by[key][p]]) for key in queue]
    k = window
    for j, key in enumerate(queue):
        k = max(k, j + window)
        while k < len(queue) and makes[k] <= reading.started_by[key][p]:  # made by the same computation
            k += 1
        if k < len(queue):
            out.setdefault(makes[k], []).append(key)
