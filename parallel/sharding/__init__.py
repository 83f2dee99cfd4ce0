"""Parameters: declared once by global shape, sharded over a mesh, initialised and updated shard by shard.

Layers may not enter: a layer declares its parameters here and lives in another room.

A module passes through these calls, in this order:

    declare(self, "weight", shape, ParamSpec(normal(0.02), shard_dim=0))   param.py: in a layer's __init__
    adopt(module)                        adopt.py: declares the parameters of an ordinary module
    shard_module(module, mesh, policy)   shard.py: DTensors over tp and ep, then FSDP2 over the data ranks
    materialise(module, mesh, ..)        shard.py: allocates and fills this rank's shards
    ShardedOptimizer([module], mesh, ..) optim.py: gradients' sums and norm; rules.py: AdamW; muon.py: Muon;
                                         average.py: an average of the weights
    local(self.weight)                   param.py: this rank's shard as a plain tensor, in a layer's forward
    adapted(self, "weight")              low_rank.py: the same with its low-rank adapter, where it has one

Initial values are a function of (seed, name, global index) alone, so every layout starts from the same
weights.
"""

from parallel.sharding.adopt import adopt
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.optim import ShardedOptimizer
from parallel.sharding.param import (
    Given,
    Init,
    ParamSpec,
    constant,
    declare,
    declare_buffer,
    declared,
    global_index,
    initial_values,
    initialise,
    keep_whole,
    local,
    normal,
    own_specs,
    seeded,
    uniform,
)
from parallel.sharding.rules import AdamW, Muon
from parallel.sharding.shard import ShardPolicy, held_indices, materialise, shard_module

__all__ = [
    "AdamW",
    "FactoryKwargs",
    "Given",
    "Init",
    "Muon",
    "ParamSpec",
    "ShardPolicy",
    "ShardedOptimizer",
    "accumulation_dtype",
    "adopt",
    "constant",
    "declare",
    "declare_buffer",
    "declared",
    "global_index",
    "held_indices",
    "initial_values",
    "initialise",
    "keep_whole",
    "local",
    "materialise",
    "normal",
    "own_specs",
    "seeded",
    "shard_module",
    "uniform",
]
