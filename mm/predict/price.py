"""Seconds of kernels and of what a rank does in an action, by a roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mm.predict.hardware import Hardware
from mm.predict.links import Places, message_seconds, processor_seconds
from mm.predict.work import Kernel, Message, Work

What = Literal["compute", "launch", "tp", "cp", "ep", "pipeline", "boundary", "data ranks", "other"]
AXES: Mapping[str, What] = {"tp": "tp", "etp": "tp", "cp": "cp", "ep": "ep"}


def kernel_seconds(kernel: Kernel, hardware: Hardware) -> float:
    """One of equal calls, without its launch: the longer of its products and its bytes."""
    moved = kernel.bytes / (hardware.memory.bandwidth * hardware.memory.efficiency)
    if not kernel.flops:
        return moved
    return max(kernel.flops / (hardware.peak_of(kernel.dtype) * share_of_peak(kernel, hardware)), moved)


def share_of_peak(kernel: Kernel, hardware: Hardware) -> float:
    """What share of the peak products of this size reach."""
    kinds = hardware.kernels
    if kernel.kind == "grouped":
        groups, m, n, k = kernel.shape
        return kinds.grouped.at(max(1.0, min(m / max(1, groups), n, k)))
    if kernel.kind == "attention":
        return kinds.attention.at(max(1.0, kernel.shape[1]))
    if kernel.kind == "convolution":
        return kinds.convolution.at(1.0)
    return kinds.product.at(max(1.0, min(kernel.shape, default=1)))


@dataclass(frozen=True)
class Price:
    """Seconds of an action on one rank, by what. exchanges: of these, each exchange of experts' rows.

    fixed: those that a micro-batch of any load takes: launches, and latencies of messages.
    """

    by: Mapping[What, float]
    exchanges: tuple[float, ...] = ()
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        """All together."""
        return sum(self.by.values())


def price(work: Work, places: Places, hardware: Hardware) -> Price:
    """What an action takes on a rank, where nothing else runs beside it."""
    by: defaultdict[What, float] = defaultdict(float)
    launches = sum(k.times for k in work.kernels) * hardware.kernels.launch_s
    for k in work.kernels:
        by["compute"] += kernel_seconds(k, hardware) * k.times
    by["launch"] += launches
    exchanges, fixed = [], launches
    for m in work.messages:
        one, least = message_price(m, places, hardware)
        by[AXES.get(m.group.axis, "other")] += one * m.times
        fixed += least * m.times
        if AXES.get(m.group.axis) == "ep" and m.op == "all_to_all":
            exchanges += [one] * round(m.times)
    return Price(by, tuple(exchanges), fixed)


def message_price(message: Message, places: Places, hardware: Hardware) -> tuple[float, float]:
    """(seconds of one of equal messages, those that it would take without its bytes). Where ranks share
    cores, its processor seconds: while one waits another computes."""
    place, empty = places.of_group(message.group), message._replace(bytes=0.0)
    if hardware.host is not None:
        one, least = (processor_seconds(x, place.ranks, hardware.host) for x in (message, empty))
        return one, least
    return message_seconds(message, place, hardware), message_seconds(empty, place, hardware)
