"""What a device, its links and its host can do: configs/hardware/NAME.yaml, read strictly.

Every section of a file says where its figures come from. Seconds, bytes and FLOPs (a multiply and an add as
two) throughout; one direction of a link.
"""

from __future__ import annotations

import bisect
import difflib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mm.config.build import build
from mm.errors import Refused

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "hardware"


@dataclass(frozen=True)
class DeviceMemory:
    """bytes: of a device. reserved: of these, what no tensor gets: context, libraries, buffers of
    communicators, fragments. bandwidth: of reads and writes together; efficiency: the share of it that
    kernels reach which only move bytes."""

    bytes: float
    reserved: float
    bandwidth: float
    efficiency: float
    source: str


@dataclass(frozen=True)
class Peak:
    """FLOP/s of a device by dtype, of dense products."""

    source: str
    float64: float | None = None
    float32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None
    float8: float | None = None


@dataclass(frozen=True)
class Curve:
    """The share of the peak that kernels of a class reach, by size: linear in log(size) between points, and
    as at the nearest point beyond them.

    size: of a product the least of m, n and k; of a grouped one the least of rows a group, n and k; of
    attention the queries; convolutions have one share for all.
    """

    share: tuple[float, ...]
    source: str
    size: tuple[float, ...] = (1.0,)

    def at(self, size: float) -> float:
        """The share at a size."""
        k = bisect.bisect_right(self.size, size)
        if k in (0, len(self.size)):
            return self.share[max(0, k - 1)]
        (a, b), (low, high) = self.size[k - 1 : k + 1], self.share[k - 1 : k + 1]
        return low + (high - low) * math.log(size / a) / math.log(b / a)


@dataclass(frozen=True)
class Kernels:
    """launch_s: what a kernel takes beside its work; on a CPU the Python and the dispatch of an operation."""

    launch_s: float
    source: str
    product: Curve
    grouped: Curve
    attention: Curve
    convolution: Curve


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes/s in one direction, inside a node of a device, across nodes of a NIC. efficiency: the
    share of it that large messages reach. latency_s: of a message from one rank to another. nics: across
    nodes, how many a node has; all its devices that send at once share them."""

    bandwidth: float
    efficiency: float
    latency_s: float
    source: str
    nics: int | None = None


@dataclass(frozen=True)
class Links:
    """node_size: devices of a node, None where all ranks are on one. across: None where there is one node."""

    inside: Link
    node_size: int | None = None
    across: Link | None = None


@dataclass(frozen=True)
class Host:
    """Ranks that are processes on shared cores, where messages too cost processor seconds.

    cores: that all ranks of a node share. collective_s: that a collective costs a rank. message_s, byte_s:
    that each message and each byte in it costs, at either end. unit_s: that gathering the weights of one unit
    of FSDP, or summing its gradients, costs beside the collective. step_s: of a step beside its actions.
    """

    cores: float
    collective_s: float
    message_s: float
    byte_s: float
    unit_s: float
    step_s: float
    source: str


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind and what joins them."""

    name: str
    memory: DeviceMemory
    peak: Peak
    kernels: Kernels
    links: Links
    host: Host | None = None

    def peak_of(self, dtype: str) -> float:
        """FLOP/s of products in a dtype; raises Refused where the file has none."""
        found = getattr(self.peak, dtype, None) if dtype != "source" else None
        if found is None:
            known = ", ".join(d for d in DTYPES if getattr(self.peak, d))
            raise Refused(f"hardware {self.name} has no peak for {dtype}; it has {known}")
        return float(found)


DTYPES = ("float64", "float32", "bfloat16", "float16", "float8")


def known_hardware() -> tuple[str, ...]:
    """Names of the files in configs/hardware."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.yaml")))


def load_hardware(name_or_path: str | Path) -> Hardware:
    """Hardware by its name in configs/hardware, or from a file.

    Raises Refused for a name that is not known, naming those that are, and for a file with a wrong key.
    """
    given = str(name_or_path)
    path = Path(given) if given.endswith((".yaml", ".yml")) or "/" in given else FOLDER / f"{given}.yaml"
    if not path.is_file():
        known = known_hardware()
        near = difflib.get_close_matches(given.lower(), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise Refused(
            f"unknown hardware {given}; {hint}known: {', '.join(known)}, or the path of a .yaml file"
        )
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise Refused(f"{path}: {' '.join(str(error).split())}") from None
    return from_mapping(raw, str(path))


def from_mapping(raw: Any, where: str) -> Hardware:
    """Hardware from plain data; where: its file, for errors. Raises Refused."""
    if not isinstance(raw, dict):
        raise Refused(f"{where}: given {type(raw).__name__}; needed: a mapping")
    try:
        made = build(Hardware, raw, "")
        _check(made)
    except Refused as error:
        raise Refused(f"{where}: {error}") from None
    return made


def _check(made: Hardware) -> None:
    """Refuse numbers that no hardware has."""
    for name in ("product", "grouped", "attention", "convolution"):
        _check_curve(f"kernels.{name}", getattr(made.kernels, name))
    memory, links, host = made.memory, made.links, made.host
    positive = {"memory.bytes": memory.bytes, "memory.bandwidth": memory.bandwidth}
    shares = {"memory.efficiency": memory.efficiency}
    least = {"memory.reserved": memory.reserved, "kernels.launch_s": made.kernels.launch_s}
    positive |= {f"peak.{d}": x for d in DTYPES if (x := getattr(made.peak, d)) is not None}
    for where, link in (("links.inside", links.inside), ("links.across", links.across)):
        if link is not None:
            positive[f"{where}.bandwidth"], shares[f"{where}.efficiency"] = link.bandwidth, link.efficiency
            least[f"{where}.latency_s"] = link.latency_s
    if host is not None:
        positive["host.cores"] = host.cores
        names = ("collective_s", "message_s", "byte_s", "unit_s", "step_s")
        least |= {f"host.{k}": getattr(host, k) for k in names}
    if links.across is not None:
        positive["links.across.nics"] = links.across.nics or 0
        positive["links.node_size"] = links.node_size or 0
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise Refused(f"{key}: given {value}; needed: more than 0")
    for key, value in least.items():
        if not 0 <= value < math.inf:
            raise Refused(f"{key}: given {value}; needed: 0 or more")
    for key, value in shares.items():
        if not 0 < value <= 1:
            raise Refused(f"{key}: given {value}; needed: above 0 and at most 1")
    if memory.reserved >= memory.bytes:
        raise Refused(
            f"memory.reserved: given {memory.reserved:g}; needed: less than memory.bytes, {memory.bytes:g}"
        )


def _check_curve(key: str, curve: Curve) -> None:
    if not curve.size or len(curve.size) != len(curve.share):
        raise Refused(
            f"{key}: given {len(curve.size)} sizes and {len(curve.share)} shares; needed: a share a size"
        )
    sizes = (0.0, *curve.size, math.inf)
    if not all(a < b for a, b in pairwise(sizes)):
        raise Refused(f"{key}.size: given {list(curve.size)}; needed: ascending, above 0")
    if not all(0 < share <= 1 for share in curve.share):
        raise Refused(f"{key}.share: given {list(curve.share)}; needed: above 0 and at most 1")
