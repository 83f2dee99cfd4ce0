"""Encoders: their contract and registry, the built-in ones, and an encoder with its projector as one module.

Authors of encoders import encoders.api alone. The language model and jobs may not enter.
"""

from encoders import adapter, fastconformer, vit
from encoders.contract import Encoder, Features, ItemBatch, pack_items
from encoders.hf import load_hf
from encoders.registry import implied_options, register, resolve
from encoders.vision import families as vision
from parallel.sharding.adopt import adopt

__all__ = [
    "Encoder",
    "Features",
    "ItemBatch",
    "adapter",
    "adopt",
    "fastconformer",
    "implied_options",
    "load_hf",
    "pack_items",
    "register",
    "resolve",
    "vision",
    "vit",
]
