"""Encoders: the contract, the registry and the built-in ones."""

from encoders import fastconformer, vit
from encoders.contract import Encoder, Features, ItemBatch, pack_items
from encoders.registry import register, resolve
from parallel.sharding.adopt import adopt

__all__ = [
    "Encoder",
    "Features",
    "ItemBatch",
    "adopt",
    "fastconformer",
    "pack_items",
    "register",
    "resolve",
    "vit",
]
