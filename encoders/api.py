"""The API for authors of encoders. Import from here alone: these names stay, wherever their code moves.

docs/adding_an_encoder.md explains how they work together. Each name has a docstring with shapes and units.

The contract

    Encoder                               the class to subclass
    ItemBatch, Features, Meta             what forward() takes, what it returns, and an item's metadata
    register                              a name for the encoder in configs
    Axes                                  the axes of the module's mesh, which its layers compute over
    Stage, whole                          the layers of one pipeline stage; the stage of all layers

Parameters

    declare, declare_buffer               register a parameter of a global shape; register a buffer
    local                                 this rank's shard of a parameter, as a plain tensor
    ParamSpec                             initial values, which dim an axis shards, how gradients are summed
    constant, normal, uniform             initial values, equal in every layout
    FactoryKwargs                         the device and dtype that a module hands to its parts
    adopt                                 take in a plain module with the values that it has

Layers

    Linear, LayerNorm                     layers with declared parameters
    enter, leave                          before column-parallel and after row-parallel weights
    run_layer                             run a layer, with recomputation if asked

Rows of items, packed end to end

    Packing, attention, depthwise_conv    whole items on one rank, which never see each other
    Share, pieces, reach                  which rows a rank has; the items in a range of rows; its neighbours
    RowGrid                               how an item's rows lie in frames, rows and columns
    to_device                             indices of the host on the device, without waiting for it
    Pairing, attend                       attention of a rank's queries to all keys of their items
    ItemAttention, ItemConvolution        the same where the keys and neighbours are on other ranks of cp
"""

from encoders.context import ItemAttention, ItemConvolution
from encoders.contract import Encoder, Features, ItemBatch, Meta
from encoders.layers import LayerNorm, enter, leave, run_layer
from encoders.registry import register
from encoders.share import Share, pieces, reach
from parallel.sequence.buckets import Pairing, attend
from parallel.sequence.grid import RowGrid
from parallel.sequence.host import to_device
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
    "RowGrid",
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
    "to_device",
    "uniform",
    "whole",
]
