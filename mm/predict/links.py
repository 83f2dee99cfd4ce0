"""Seconds of collectives and messages, by where the ranks of their group are.

Bandwidth: rings, or what moves as much. Of a tensor of S bytes over N ranks, each receives (N - 1) / N S in a
gather, a sum into shards or an all-to-all, and twice as much in a sum. What crosses nodes is shared by the
ranks that the group has on a node, but for an all-to-all and a send, where each rank has rows of its own.

Latency: a sum is a tree, a gather or a sum into shards a ring; an all-to-all serves eight peers at once, as
NCCL does by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mm.errors import Refused
from mm.predict.hardware import Hardware, Host
from mm.predict.work import Message
from parallel.topology.groups import Group, GroupPlan

PEERS_AT_ONCE = 8  # of an all-to-all


class Place(NamedTuple):
    """Where the ranks of a group are: how many, on how many nodes, and on the fullest of these. sharing: how
    many devices of a node send across nodes at once."""

    ranks: int
    nodes: int = 1
    most: int = 1
    sharing: int = 1


@dataclass(frozen=True)
class Places:
    """The groups of a job on nodes of `node_size` ranks; None where all ranks are on one."""

    groups: GroupPlan
    node_size: int | None
    _known: dict[Group, Place]

    @staticmethod
    def of(groups: GroupPlan, node_size: int | None) -> Places:
        """Of all groups of a job."""
        return Places(groups, node_size, {})

    def of_group(self, group: Group) -> Place:
        """The group of a name that crosses most; of one rank where there is none of several."""
        if group not in self._known:
            self._known[group] = self._place(group, self.groups.named.get(group, ()))
        return self._known[group]

    def _place(self, group: Group, instances: Sequence[tuple[int, ...]]) -> Place:
        if not instances:
            return Place(1)
        size = self.node_size
        if size is None:
            return Place(len(instances[0]), most=len(instances[0]))
        if group.axis == "pp" or group.scope == "edge":
            instances = [tuple(sorted({a, b})) for line in instances for a, b in _hops(group, line)]
        # All groups of a name have one size: a line a group, its nodes in order, in runs of one node.
        nodes = np.sort(np.asarray(instances, np.int64) // size, axis=1)
        begins = np.diff(nodes, axis=1, prepend=-1) > 0
        at = np.arange(nodes.shape[1])
        most = (at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)).max(axis=1) + 1
        count = begins.sum(axis=1)
        worst = int(np.argmax(count * (len(at) + 1) - most))
        across = np.bincount(nodes[count > 1].reshape(-1), minlength=1)
        return Place(len(at), int(count[worst]), int(most[worst]), max(1, int(across.max())))


def _hops(group: Group, line: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pairs of ranks that exchange messages: neighbours of a pipeline; of an edge its first and last."""
    if group.scope == "edge":
        return [(line[0], line[-1])]
    return list(pairwise(line))


def message_seconds(message: Message, place: Place, hardware: Hardware) -> float:
    """Seconds of one of equal messages from its start to its end, where all members start together."""
    if place.ranks < 2:
        return 0.0
    inside, across = hardware.links.inside, hardware.links.across
    received = _received(message, place.ranks)
    near = inside.bandwidth * inside.efficiency
    if place.nodes == 1:
        return _latency(message.op, place.ranks, inside.latency_s) + received / near
    if across is None:
        raise Refused(
            f"hardware {hardware.name} has no links.across, but {message.op} of {message.group} joins "
            f"{place.nodes} nodes; needed: links.across, or layouts within one node"
        )
    crossing = message.bytes * (place.ranks - place.most) / place.ranks
    own = message.op in ("all_to_all", "send")
    if message.op == "send":
        crossing = message.bytes
    per_rank = crossing * (2 if message.op == "all_reduce" else 1) / (1 if own else place.most)
    nics = across.nics or 1
    far = across.bandwidth * across.efficiency * min(1.0, nics / max(1, place.sharing))
    if message.op == "all_to_all":  # peers are served one by one, most of them on other nodes
        latency = _latency(message.op, place.ranks, across.latency_s)
    else:
        latency = _latency(message.op, place.nodes, across.latency_s)
        latency += _latency(message.op, place.most, inside.latency_s) if place.most > 1 else 0.0
    stays = received if message.op != "all_to_all" else received - per_rank
    return latency + max(per_rank / far, stays / near if place.most > 1 else 0.0)


def _received(message: Message, ranks: int) -> float:
    """Bytes that a rank receives."""
    if message.op == "send":
        return message.bytes
    return message.bytes * (ranks - 1) / ranks * (2 if message.op == "all_reduce" else 1)


def _latency(op: str, ranks: int, one: float) -> float:
    if op == "send":
        return one
    if op == "all_reduce":
        return 2 * one * math.ceil(math.log2(ranks))
    if op == "all_to_all":
        return one * math.ceil((ranks - 1) / PEERS_AT_ONCE)
    return one * (ranks - 1)


def processor_seconds(message: Message, ranks: int, host: Host) -> float:
    """Processor seconds that one of equal messages costs a rank: of what it sends and of what it receives."""
    if ranks < 2:
        return 0.0
    if message.op == "send":
        return host.message_s + host.byte_s * message.bytes
    messages = 2 * (ranks - 1) * (2 if message.op == "all_reduce" else 1)
    return host.collective_s + host.message_s * messages + 2 * host.byte_s * _received(message, ranks)
