"""Which storages of a device live when: the peak of memory, and what it consists of.

Storages are followed from the operation that makes them until they are freed; kinds are told afterwards, from
what became of them. Sharded parameters are given back to FSDP by resizing their storages, which no operation
shows: their sizes are looked up again at each of FSDP's own operations and between actions.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mm.virtual.records import Live, Memory
from mm.virtual.source import Site
from mm.virtual.values import device_type

KINDS = (
    "parameters",
    "gathered_parameters",
    "gradients",
    "optimizer",
    "activations",
    "communication",
    "temporary",
    "other",
)
LISTED = 40  # of what was live at the peak, the largest
# Where buffers of messages are made.
_MESSAGES = ("parallel/comm/transport.py", "parallel/comm/pipeline.py", "parallel/boundary/")


class Moment(NamedTuple):
    """What a rank does at a time. number: of the action, counted from 1; forward: whether it is a FORWARD."""

    number: int
    action: str
    module: str
    forward: bool


@dataclass(eq=False)
class Entry:
    """One storage. kind: as far as it is known at once, else "". died: the action in which it was freed."""

    size: int
    made_by: str
    site: Site
    moment: Moment
    module: str
    kind: str = ""
    died: int | None = None
    changes: list[tuple[int, int]] = field(default_factory=list)  # (time, bytes more)
    storage: weakref.ref[torch.UntypedStorage] | None = None


class Ledger:
    """Follows the storages on a device. now: what the rank does at this time; the caller sets it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now = Moment(0, "start", "other", False)
        self.entries: list[Entry] = []
        self._clock = 0
        self._me = object()
        self._resized: list[Entry] = []  # whose storages FSDP frees and allocates again

    def made(self, x: Tensor, op: str, site: Callable[[], Site]) -> None:
        """Follow the storage of a result of `op`, unless it is followed already."""
        if device_type(x) != self.device.type:
            return
        storage = x.untyped_storage()
        if self._entry(storage) is not None:
            return
        entry = Entry(storage.nbytes(), op, site(), self.now, self.now.module)
        if entry.site.fsdp:
            self.look_again()  # a unit of one rank is freed without any operation of FSDP's own
        self._follow(storage, entry)
        if entry.site.fsdp in _GATHERED:
            entry.kind = "gathered_parameters"
            self._resized.append(entry)
        elif entry.site.fsdp or entry.site.file.startswith(_MESSAGES):
            entry.kind = "communication"

    def mark(self, tensors: Iterable[Tensor], kind: str, module: str) -> None:
        """Name the kind and the module of storages; those that are not followed yet are from now on."""
        for x in tensors:
            storage = x.untyped_storage()
            entry = self._entry(storage)
            if entry is None:
                if device_type(x) != self.device.type:
                    continue
                entry = Entry(storage.nbytes(), kind, Site("", 0, ""), self.now, module)
                self._follow(storage, entry)
            entry.kind, entry.module = kind, module

    def resized(self, tensors: Iterable[Tensor], module: str) -> None:
        """Follow storages for whole weights that an earlier step has left, of which FSDP changes the size."""
        for x in tensors:
            storage = x.untyped_storage()
            if device_type(x) != self.device.type or self._entry(storage) is not None:
                continue
            entry = Entry(storage.nbytes(), "FSDP", Site("", 0, ""), self.now, module, "gathered_parameters")
            self._follow(storage, entry)
            self._resized.append(entry)

    def _entry(self, storage: torch.UntypedStorage) -> Entry | None:
        """What this ledger knows of a storage; another may have followed it before."""
        ledger, entry = getattr(storage, "_followed", (None, None))
        return entry if ledger is self._me else None

    def _follow(self, storage: torch.UntypedStorage, entry: Entry) -> None:
        followed = self._me, entry
        storage._followed = followed  # type: ignore[attr-defined]  # an attribute of this one storage
        self._clock += 1
        entry.changes.append((self._clock, entry.size))
        self.entries.append(entry)

        def freed(_: object) -> None:
            self._clock += 1
            entry.changes.append((self._clock, -entry.size))
            entry.died = self.now.number

        entry.storage = weakref.ref(storage, freed)

    def look_again(self) -> None:
        """Notice the storages that were resized."""
        live = []
        for entry in self._resized:
            storage = None if entry.storage is None else entry.storage()
            if storage is None:
                continue
            live.append(entry)
            size = storage.nbytes()
            if size != entry.size:
                self._clock += 1
                entry.changes.append((self._clock, size - entry.size))
                entry.size = size
        self._resized = live

    def memory(self) -> Memory:
        """The peak of all that was followed."""
        changes = sorted((time, size, k) for k, e in enumerate(self.entries) for time, size in e.changes)
        total = peak = at = 0
        for time, size, _ in changes:
            total += size
            if total > peak:
                peak, at = total, time
        held: Counter[int] = Counter()
        for time, size, k in changes:
            if time <= at:
                held[k] += size
        live = {k: n for k, n in held.items() if n}
        last = max((self.entries[k] for k in live), key=lambda e: e.changes[0][0], default=None)
        return self._summary(peak, live, "" if last is None else last.moment.action)

    def _summary(self, peak: int, live: dict[int, int], during: str) -> Memory:
        kinds, modules = Counter(dict.fromkeys(KINDS, 0)), Counter[str]()
        same: dict[tuple[str, str, str, str], list[int]] = {}
        for k, size in live.items():
            entry = self.entries[k]
            kind = kind_of(entry)
            kinds[kind] += size
            modules[entry.module] += size
            where = f"{entry.site.file}:{entry.site.line}" if entry.site.file else ""
            same.setdefault((kind, entry.module, entry.made_by, where), []).append(size)
        rows = [Live(*key, sum(sizes), len(sizes)) for key, sizes in same.items()]
        rows.sort(key=lambda r: -r.bytes)
        return Memory(peak, dict(kinds), dict(modules), during, tuple(rows[:LISTED]))


_GATHERED = ("init_all_gather_outputs", "init_unsharded_param", "alloc_all_gather_outputs")


def kind_of(entry: Entry) -> str:
    """What a storage was for, as its life shows."""
    if entry.kind:
        return entry.kind
    if entry.died == entry.moment.number:
        return "temporary"
    return "activations" if entry.moment.forward else "other"
