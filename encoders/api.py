"""What the author of an encoder imports. The names here stay where they are; those of other modules may move.

The contract

    Encoder, Features, ItemBatch, Meta    what an encoder is, gives and takes
    Axes                                  the axes of the module's mesh, as its layers see them
    Stage, whole                          the layers of a pipeline stage, or all of them
    register                              a name for it in configs

Parameters

    declare, declare_buffer, local        a parameter with its global shape, and the part that this rank holds
    ParamSpec                             how it starts, which dim an axis shards, how its gradient is summed
    constant, normal, uniform             initial values
    FactoryKwargs                         device and dtype, handed on to the parts of a module
    adopt                                 a module of any make, with the values that it has

Layers

    Linear, LayerNorm                     with declared parameters
    enter, leave                          into and out of weights that are sharded over tp
    run_layer                             a layer whose activations may be recomputed

Rows of items, packed end to end

    Packing, attention, depthwise_conv    sequences on one rank that never mix
    Share, pieces, reach                  which rows of a data-parallel rank's items this rank has
    Pairing, attend                       attention of the queries that a rank has to all keys of their items
    ItemAttention, ItemConvolution        the same where the keys and neighbours are on other ranks of cp
"""

from encoders.attention import Pairing, attend
from encoders.context import ItemAttention, ItemConvolution
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.registry import register
from encoders.share import Share, pieces, reach
from parallel.sequence.packed import Packing, attention, depthwise_conv
from parallel.sharding.adopt import adopt
from parallel.sharding.dtypes import FactoryKwargs
from parallel.sharding.param import ParamSpec, constant, declare, declare_buffer, local, normal, uniform
from parallel.tensor_parallel.layers import Linear
from parallel.topology.axis import Axes
from parallel.topology.stage import Stage, whole

__all__ = [
    "Axes",
    "Encoder",
    "FactoryKwargs",
    "Features",
    "ItemAttention",
    "ItemBatch",
    "ItemConvolution",
    "LayerNorm",
    "Linear",
    "Meta",
    "Packing",
    "Pairing",
    "ParamSpec",
    "Share",
    "Stage",
    "adopt",
    "attend",
    "attention",
    "constant",
    "declare",
    "declare_buffer",
    "depthwise_conv",
    "enter",
    "leave",
    "local",
    "normal",
    "pieces",
    "reach",
    "register",
    "run_layer",
    "uniform",
    "whole",
]
