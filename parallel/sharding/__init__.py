"""Parameters: declared once by global shape, sharded over a mesh, initialised and updated shard by shard.

No layer may enter: layers declare their parameters here.
"""

from parallel.sharding.adopt import adopt
from parallel.sharding.dtypes import FactoryKwargs, accumulation_dtype
from parallel.sharding.optim import AdamW, ShardedOptimizer
from parallel.sharding.param import (
    Init,
    ParamSpec,
    constant,
    declare,
    declare_buffer,
    declared,
    local,
    normal,
    uniform,
)
from parallel.sharding.shard import ShardPolicy, materialise, shard_module

__all__ = [
    "AdamW",
    "FactoryKwargs",
    "Init",
    "ParamSpec",
    "ShardPolicy",
    "ShardedOptimizer",
    "accumulation_dtype",
    "adopt",
    "constant",
    "declare",
    "declare_buffer",
    "declared",
    "local",
    "materialise",
    "normal",
    "shard_module",
    "uniform",
]
