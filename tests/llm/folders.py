"""Published folders in tests: read without our reader, compared, counted, read into a layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from llm.config import LLMConfig
from llm.hf import load_weights
from llm.model import LLM
from parallel import checkpoint as checkpoint
from parallel.published import SafeFolder, module_tensors
from parallel.sharding.shard import ShardPolicy, shard_module
from parallel.topology.layout import Layout
from parallel.topology.mesh import build_mesh


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files, without our reader."""
    out: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        out |= load_file(file)
    return out


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors differ in a byte, a shape or a dtype."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()

    def same(a: Tensor, b: Tensor) -> bool:
        raw = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)

    return [k for k in ours if not same(ours[k], theirs[k])]


class Counting(SafeFolder):
    """Counts the elements that are read."""

    count = 0

    def read(self, key: str, index: Sequence[slice]) -> Tensor:
        block = super().read(key, index)
        self.count += block.numel()
        return block


def into_layout(folder: str, cfg: LLMConfig, layout: dict[str, Any], out: str) -> dict[str, Any]:
    """Read a folder straight into this rank's shards, and save a distributed checkpoint of them."""
    mesh = build_mesh(Layout("llm", tuple(range(dist.get_world_size())), **layout), "cpu")
    assert mesh is not None
    model = LLM(cfg, mesh.axes, device="meta", dtype=torch.float32)
    shard_module(model, mesh, ShardPolicy(list(model.layers)), param_dtype=torch.float32)
    model.to_empty(device="cpu")
    source = Counting(folder)
    load_weights(model, source, mesh)
    tensors = module_tensors(model)
    checkpoint.save(Path(out), 0, {f"llm.{n}": t for n, t in tensors.items()}, {}, keep=1)
    held = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors.values())
    mesh.close()
    return {"held": held, "read": source.count, "all": sum(t.numel() for t in tensors.values())}
