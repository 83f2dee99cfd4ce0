"""Ranks that hold the same weights compare hashes of them, which finds damage that nothing else shows.

A bit that flips in one copy of a weight stays there, and spreads with every gradient. Copies get equal sums
and so stay equal bit for bit: those of the data ranks, of replicated weights over tp, of tied ones over the
ends of a pipeline, and their optimizer state. Each tensor is read once, on its device.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm.checkpoint.state import state_tensors
from mm.config.outline import SINK
from mm.errors import ReplicasDiffer
from mm.ranks.job import Job
from parallel.sharding.param import ParamSpec, declared, local
from parallel.sharding.shard import data_mesh, sharded_dims
from parallel.topology.mesh import ModuleMesh

WIDTH = 1024  # elements of a row that a hash sums over
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TOLD = 3  # tensors that an error names

Hashes = Mapping[str, Mapping[str, str]]  # by copy (_copies) and tensor


def check_replicas(job: Job, step: int) -> None:
    """Raise ReplicasDiffer on all ranks where copies of a tensor differ after `step` steps; every rank calls
    this. Waits for the device once."""
    mine = hashes(job)
    short = {copy: _digest("".join(found.values())) for copy, found in mine.items()}
    every = [json.loads(text) for text in job.control.tell(json.dumps(short))]
    odd = sorted({c for one in every for c in one if len({other.get(c, one[c]) for other in every}) > 1})
    if odd:
        heard = job.control.tell(json.dumps({copy: mine[copy] for copy in odd if copy in mine}))
        raise ReplicasDiffer(f"after step {step} {difference([json.loads(text) for text in heard])}")


def hashes(job: Job) -> dict[str, dict[str, str]]:
    """By copy and tensor, a hash of the part of it that this rank holds."""
    tensors = state_tensors(job)
    found = torch.stack([hashed(t) for t in tensors.values()]).tolist()
    copies = _copies(job)
    out: dict[str, dict[str, str]] = {}
    for name, value in sorted(zip(tensors, found, strict=True)):
        module, _, rest = name.partition(".")
        parts = rest.split(".")
        # State of an optimizer is sharded as its parameter: RULE.NAME.KEY.
        of = f"{module}.{'.'.join(parts[1:-1])}"
        buffers = f"{module} {job.meshes[module].layout.coord(job.rank.rank).pp} whole"
        copy = copies.get(name) or copies.get(of) or buffers
        out.setdefault(copy, {})[name] = f"{value & (1 << 64) - 1:016x}"
    return out


def hashed(tensor: Tensor) -> Tensor:
    """An int64 scalar on the device that a change of any one bit changes, and other changes almost surely.

    The bits as integers, modulo 2^64, times a factor that depends on the column and the row of the element.
    It is odd, so that no change of one bit is a multiple of 2^64.
    """
    flat = local(tensor.detach()).contiguous().view(-1)
    bits = flat.view(BITS[flat.element_size()])
    rows = len(bits) // WIDTH
    whole, rest = bits[: rows * WIDTH].view(rows, WIDTH), bits[rows * WIDTH :]
    by_column, by_row = whole.sum(0, dtype=torch.int64), whole.sum(1, dtype=torch.int64)
    total = (by_column * _odd(WIDTH, 0x9E3779B97F4A7C1, bits)).sum()
    total = total + (by_row * (_odd(rows, 0x3C6EF372FE94F82B, bits) - 1)).sum()
    return total + (rest.to(torch.int64) * _odd(len(rest), 0x2545F4914F6CDD1D, bits)).sum()


def _odd(n: int, factor: int, like: Tensor) -> Tensor:
    """n odd numbers. factor: odd."""
    return (torch.arange(n, dtype=torch.int64, device=like.device) * 2 + 1) * factor


def _copies(job: Job) -> dict[str, str]:
    """By full name of a parameter on this rank, its copy: ranks of the same one hold the same elements."""
    out = {}
    for m, parts in job.parts.items():
        mesh = job.meshes[m]
        pp = mesh.layout.coord(job.rank.rank).pp
        for part in parts.values():
            for name, param, spec in declared(part):
                tied = m == SINK and name in job.blueprint.shared
                out[f"{m}.{name}"] = f"{m} {'ends' if tied else pp} {_shard(spec, mesh, param.ndim)}"
    return out


def _shard(spec: ParamSpec, mesh: ModuleMesh, ndim: int) -> str:
    """Which shard of a parameter this rank holds."""
    found = [f"{axis}{mesh.over(spec.view, axis).get_local_rank()}" for axis in sharded_dims(spec, mesh)]
    over = data_mesh(spec, mesh)
    if ndim and over.size() > 1:
        found.append(f"{(over.mesh_dim_names or ('data',))[0]}{over.get_local_rank()}")
    return " ".join(found)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def difference(ranks: Sequence[Hashes]) -> str:
    """In words, which ranks hold what others do not. ranks: by rank, the copies that differ."""
    copy = min(c for one in ranks for c in one)
    held = {r: one[copy] for r, one in enumerate(ranks) if copy in one}
    count = Counter(_digest("".join(found.values())) for found in held.values())
    (most, n), *_ = count.most_common()
    wrong = [r for r, found in held.items() if _digest("".join(found.values())) != most]
    right = [r for r in held if r not in wrong]
    names = [k for k in held[right[0]] if any(held[r][k] != held[right[0]][k] for r in wrong)]
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    tensors = f"of {', '.join(names[:TOLD])}{more}, of module {copy.split()[0]}"
    if n > len(held) - n:
        agree = ", which agree," if len(right) > 1 else ""
        said = f"{_ranks(wrong)} differ{'s' * (len(wrong) == 1)} from {_ranks(right)}{agree}"
    else:
        said = f"{_ranks(right)} and {_ranks(wrong)} differ, and no majority says which is right,"
    return (
        f"{said} in their copies {tensors}. Something has changed memory there, or a computation is not "
        "repeatable: test that machine; a resume goes on from the last checkpoint"
    )


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
